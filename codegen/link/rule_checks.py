"""Checks all rewrite rules together: that rewriting terminates, and that no rule is shadowed by another one."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.model.op import AttrName, AttrValue
from sageLLM.codegen.model.rule import PassDef, PatternCall, RuleDef, SearchStep

Located = tuple[PassDef, RuleDef]


def check_rules(passes: Sequence[PassDef], sink: Sink, is_base: Callable[[PassDef], bool]) -> None:
    """Reports rules that may not terminate or never fire. The passes come in pipeline order.

    A finding that involves a pass of an overlay is reported there: the package's passes alone are sound.
    """
    rules = [(pass_, rule) for pass_ in passes for rule in sorted(pass_.rules, key=lambda rule: -rule.benefit)]
    _check_termination(rules, sink, is_base)
    for i, late in enumerate(rules):
        shadowing = next((early for early in rules[:i] if _shadows(early, late)), None) or next(
            (other for other in rules[i + 1 :] if other[0] is late[0] and _takes_part(other, late)), None
        )
        if shadowing is not None:
            _report_unreachable(late, shadowing, sink, is_base)


# termination


def _check_termination(rules: Sequence[Located], sink: Sink, is_base: Callable[[PassDef], bool]) -> None:
    """Reports a cycle of rules that produce each other's ops, none of which shrinks the graph or is bounded.

    A rule enables another one by producing an op of its pattern. Rules that shrink the graph are left out: alone they
    fire at most once per node. A larger rule that undoes a shrinking one is not found here; the driver stops after a
    fixed number of rounds.
    """
    enables: dict[tuple[str, str], Located] = {}
    for pass_, rule in rules:
        if len(rule.replacement) < len(rule.pattern) or rule.bounded is not None:
            continue
        for old in rule.pattern:
            for new in rule.replacement:
                enables[old.op.name, new.op.name] = (pass_, rule)
    cycle = [(a, enables[a, b]) for a, b in find_cycle(enables)]
    if not cycle:
        return
    own = [i for i, (_, (pass_, _)) in enumerate(cycle) if not is_base(pass_)]
    cycle = [*cycle[own[0] :], *cycle[: own[0]]] if own else cycle
    (start, (pass_, rule)), *others = cycle
    path = " -> ".join([*(name for name, _ in cycle), start])
    related = tuple((f"rule '{r.name}'", p.entry.span(*r.path)) for _, (p, r) in others)
    message = f"rewriting may not terminate: no rule of the cycle {path} shrinks the graph"
    help = "make one rule replace more nodes than it inserts, or limit it: `bounded: 1`"
    sink.error("SAGE314", message, pass_.entry.span(*rule.path), help, related)


def find_cycle(edges: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
    """The edges of one cycle, or none."""
    if not edges:
        return []
    import networkx  # imported here because it is a third of the generator's start-up time, and rarely needed

    try:
        return [(str(a), str(b)) for a, b in networkx.find_cycle(networkx.DiGraph(list(edges)))]
    except networkx.NetworkXNoCycle:
        return []


# rules that never fire


def _shadows(early: Located, late: Located) -> bool:
    """Whether a rule that is tried earlier fires wherever the later one would."""
    is_same_site = embed(early[1], late[1], len(late[1].pattern) - 1) is not None
    return _can_take(early, late) and (is_same_site or _takes_part(early, late))


def _takes_part(other: Located, late: Located) -> bool:
    """Whether a rule always replaces an inner part of the other's pattern first.

    In one pass nodes are visited in graph order, so an inner node is tried before the anchor, whatever the benefit.
    A rule that inserts its anchor's op again may leave the other rule a match.
    """
    rule, victim = other[1], late[1]
    leaves_anchor = rule.anchor.op.name in [call.op.name for call in rule.replacement]
    inner = range(len(victim.pattern) - 1)
    return _can_take(other, late) and not leaves_anchor and any(embed(rule, victim, at) for at in inner)


def _can_take(first: Located, late: Located) -> bool:
    """Whether only its pattern limits where the first rule fires in the graphs of the other one."""
    (pass_, rule), (other, _) = first, late
    is_free = not rule.where and rule.bounded is None
    if pass_.spec.kernels and not (other.spec.kernels and {*other.spec.kernels} <= {*pass_.spec.kernels}):
        return False
    return is_free and pass_.spec.level == other.spec.level and {*other.spec.phases} <= {*pass_.spec.phases}


def _report_unreachable(late: Located, shadowing: Located, sink: Sink, is_base: Callable[[PassDef], bool]) -> None:
    (pass_, rule), (other, first) = late, shadowing
    is_same = len(rule.pattern) == len(first.pattern)
    why = "has the same pattern and is tried first" if is_same else f"replaces {first.anchor.op.name} first"
    message = f"rule '{rule.name}' never fires: '{first.name}' {why}"
    spans = [pass_.entry.span(*rule.path), other.entry.span(*first.path)]
    related = (("the rule that is tried first", spans[1]),)
    if is_base(pass_) and not is_base(other):
        spans, related = spans[::-1], ((f"rule '{rule.name}'", spans[0]),)
    help = "remove one of them, or change a pattern or the order"
    sink.error("SAGE313", message, spans[0], help, related)


def embed(small: RuleDef, large: RuleDef, at: int) -> set[int] | None:
    """The calls of the large pattern that the small one, anchored at `at`, matches whenever the large one does."""
    return _Embedding(small, large).image(at)


@dataclass(slots=True)
class _Embedding:
    """Maps the values and attrs of a small pattern to those of a large one."""

    small: RuleDef
    large: RuleDef
    values: dict[str, str | None] = field(default_factory=dict)
    attrs: dict[str, AttrValue] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)  # calls of the small pattern -> of the large one

    def image(self, at: int) -> set[int] | None:
        if not self._bind(len(self.small.pattern) - 1, at):
            return None
        for step in self.small.search():
            target = self._target(step)
            if target is None or not self._bind(step.position, target):
                return None
        return set(self.taken.values()) if self._removes_only_its_own() else None

    def _target(self, step: SearchStep) -> int | None:
        """The one call of the large pattern that corresponds to the small one's next call, if it is unambiguous."""
        call, value = self.small.pattern[step.position], self.values[step.via]
        is_producer = step.via in call.targets
        found = [
            i
            for i, other in enumerate(self.large.pattern)
            if other.op is call.op and value in (other.targets if is_producer else other.reads)
        ]
        return found[0] if len(found) == 1 else None

    def _bind(self, index: int, target: int) -> bool:
        mine, other = self.small.pattern[index], self.large.pattern[target]
        if mine.op is not other.op or target in self.taken.values():
            return False
        self.taken[index] = target
        pairs = [*mine.operands.items()]
        fits = all(self._same_value(name, other.operands[operand]) for operand, name in pairs)
        fits = fits and all(map(self._same_value, mine.targets, other.targets))
        return fits and all(self._same_attr(mine, other, attr.name) for attr in mine.op.attrs)

    def _same_value(self, name: str | None, other: str | None) -> bool:
        if name is None or other is None:
            return name == other or (name is not None and name in self.small.optional)
        if other in self.large.optional and name not in self.small.optional:
            return False  # without this operand only the large pattern matches
        return self.values.setdefault(name, other) == other

    def _same_attr(self, mine: PatternCall, other: PatternCall, name: str) -> bool:
        """A name matches any value; a constant, or the default of an omitted attr, only itself."""
        default = getattr(mine.op.attr(name), "default", None)
        expected, actual = dict(mine.attrs).get(name, default), dict(other.attrs).get(name, default)
        if isinstance(expected, AttrName):
            return self.attrs.setdefault(expected.name, actual) == actual
        return expected == actual

    def _removes_only_its_own(self) -> bool:
        """Whether the values that the small rule removes are neither kept nor read elsewhere in the large pattern."""
        taken = set(self.taken.values())
        inner = {t for call in self.small.pattern for t in call.targets} - {*self.small.keep}
        hidden = {self.values[name] for name in inner}
        outside = [call for i, call in enumerate(self.large.pattern) if i not in taken]
        return not hidden & {*self.large.keep, *(name for call in outside for name in call.reads)}
