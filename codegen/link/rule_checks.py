"""Checks over all rewrite rules: that rewriting ends, and that no rule always finds its nodes taken by another."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.model.op import AttrName, Scalar
from sageLLM.codegen.model.rule import Found, PassDef, PatternCall, RuleDef

Located = tuple[PassDef, RuleDef]


def check_rules(passes: Sequence[PassDef], sink: Sink) -> None:
    """Findings about the rules of passes, which come in the order in which they run."""
    rules = [(one, rule) for one in passes for rule in sorted(one.rules, key=lambda rule: -rule.benefit)]
    _check_termination(rules, sink)
    for i, late in enumerate(rules):
        taker = next((early for early in rules[:i] if _takes_first(early, late)), None) or next(
            (other for other in rules[i + 1 :] if other[0] is late[0] and _takes_part(other, late)), None
        )
        if taker is not None:
            _report_unreachable(late, taker, sink)


# termination


def _check_termination(rules: Sequence[Located], sink: Sink) -> None:
    """Rules that do not shrink the graph must not feed one another in a circle, unless one of them is bounded."""
    feeds: dict[tuple[str, str], Located] = {}
    for one, rule in rules:
        if len(rule.replacement) < len(rule.pattern) or rule.bounded is not None:
            continue
        for old in rule.pattern:
            for new in rule.replacement:
                feeds[old.op.name, new.op.name] = (one, rule)
    circle = [(a, feeds[a, b]) for a, b in find_circle(feeds)]
    if not circle:
        return
    (start, (one, rule)), *others = circle
    path = " -> ".join([*(name for name, _ in circle), start])
    related = tuple((f"rule '{r.name}'", p.entry.span(*r.path)) for _, (p, r) in others)
    message = f"rewriting may never end: {path}, and no rule of the circle shrinks the graph"
    help = "let a rule give fewer nodes, or say how often it may fire: `bounded: 1`"
    sink.error("SAGE314", message, one.entry.span(*rule.path), help, related)


def find_circle(edges: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
    """The edges of one circle, or none."""
    if not edges:
        return []
    import networkx  # a third of the generator's start-up time, and hardly ever needed

    try:
        return [(str(a), str(b)) for a, b in networkx.find_cycle(networkx.DiGraph(list(edges)))]
    except networkx.NetworkXNoCycle:
        return []


# rules that never fire


def _takes_first(early: Located, late: Located) -> bool:
    """Whether a rule that is tried before another fires wherever that one would."""
    is_same_site = embed(early[1], late[1], len(late[1].pattern) - 1) is not None
    return _can_take(early, late) and (is_same_site or _takes_part(early, late))


def _takes_part(other: Located, late: Located) -> bool:
    """Whether a rule takes nodes from the midst of another's, in an earlier pass or in the same: nodes are visited in
    graph order. One that puts in its anchor's op again may leave the other something."""
    rule, victim = other[1], late[1]
    leaves_anchor = rule.anchor.op.name in [call.op.name for call in rule.replacement]
    inner = range(len(victim.pattern) - 1)
    return _can_take(other, late) and not leaves_anchor and any(embed(rule, victim, at) for at in inner)


def _can_take(first: Located, late: Located) -> bool:
    """Whether nothing but its pattern keeps the first rule from firing in the graphs of the other."""
    (one, rule), (other, _) = first, late
    is_free = not rule.where and rule.bounded is None
    return is_free and one.spec.level == other.spec.level and {*other.spec.phases} <= {*one.spec.phases}


def _report_unreachable(late: Located, taker: Located, sink: Sink) -> None:
    (one, rule), (other, first) = late, taker
    is_same = len(rule.pattern) == len(first.pattern)
    why = "has the same pattern and is tried first" if is_same else f"takes {first.anchor.op.name} before it"
    message = f"rule '{rule.name}' never fires: '{first.name}' {why}"
    related = (("the rule before it", other.entry.span(*first.path)),)
    sink.error("SAGE313", message, one.entry.span(*rule.path), "remove one, or change a pattern or the order", related)


def embed(small: RuleDef, large: RuleDef, at: int) -> set[int] | None:
    """The calls of the large pattern that the small one matches whenever the large one does, its anchor at `at`."""
    return _Embedding(small, large).image(at)


@dataclass(slots=True)
class _Embedding:
    """Maps the values and attrs of a small pattern to those of a large one."""

    small: RuleDef
    large: RuleDef
    values: dict[str, str | None] = field(default_factory=dict)
    attrs: dict[str, AttrName | Scalar | None] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)  # calls of the small pattern -> of the large one

    def image(self, at: int) -> set[int] | None:
        if not self._bind(len(self.small.pattern) - 1, at):
            return None
        for step in self.small.search():
            target = self._target(step)
            if target is None or not self._bind(step.position, target):
                return None
        return set(self.taken.values()) if self._hides_enough() else None

    def _target(self, step: Found) -> int | None:
        """The one call of the large pattern that stands where the small one's next call does."""
        call, value = self.small.pattern[step.position], self.values[step.by]
        gives = step.by in call.targets
        found = [
            i
            for i, other in enumerate(self.large.pattern)
            if other.op is call.op and value in (other.targets if gives else other.reads)
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
        return self.values.setdefault(name, other) == other

    def _same_attr(self, mine: PatternCall, other: PatternCall, name: str) -> bool:
        """Any value goes with a name; a constant, and a default that is not named, only with itself."""
        default = getattr(mine.op.attr(name), "default", None)
        wanted, given = dict(mine.attrs).get(name, default), dict(other.attrs).get(name, default)
        if isinstance(wanted, AttrName):
            return self.attrs.setdefault(wanted.name, given) == given
        return wanted == given

    def _hides_enough(self) -> bool:
        """What the small rule takes away is read by nothing else in the large one, and not kept there."""
        taken = set(self.taken.values())
        inner = {t for call in self.small.pattern for t in call.targets} - {*self.small.keep}
        hidden = {self.values[name] for name in inner}
        outside = [call for i, call in enumerate(self.large.pattern) if i not in taken]
        return not hidden & {*self.large.keep, *(name for call in outside for name in call.reads)}
