"""Passes over execution graphs, and the driver of rewrite rules.

A rule is a function of a graph and a node: it returns a `Rewrite` (what to replace by what), a `NearMiss` (it matched
in part, and why it went no further), or None. The driver applies rules to a fixpoint and counts everything.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Container, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from sageLLM.runtime.core.errors import IRError, TypeMismatch
from sageLLM.runtime.core.graph import ExecutionGraph, Level, Stage
from sageLLM.runtime.core.ir import AttrValue, ExecutionNode, Inference, InferKey, OpNode, TensorRef, infer_key
from sageLLM.runtime.core.verify import same_memory

MAX_ROUNDS = 8
"""Rounds over the graph. Rules are checked to shrink it, so a fixpoint is reached long before."""


class OptimizationPass(ABC):
    """A named transformation. `apply` returns a valid graph and leaves the one that it is given as it was.

    `stage` and `level` say where in the pipeline it runs, `phases` on the graphs of which phases.
    """

    spec: ClassVar[str] = ""
    stage: ClassVar[str] = "fuse"
    level: ClassVar[Level] = "kernel"
    phases: ClassVar[frozenset[Stage]] = frozenset({"prefill", "decode", "hybrid"})

    @property
    @abstractmethod
    def name(self) -> str:
        """How reports and switches call the pass."""

    @abstractmethod
    def apply(self, graph: ExecutionGraph) -> ExecutionGraph:
        """The transformed graph."""


@dataclass(frozen=True, slots=True)
class NewCall:
    """An op that a rewrite puts in: its operands, its attributes, and its outputs in order.

    An output that is a value of the pattern takes that value's place. A text names a new value, for the operands of the
    calls after it; in the graph it gets a name of its own.
    """

    op: type[OpNode]
    inputs: Mapping[str, TensorRef | str | None]
    attrs: Mapping[str, AttrValue]
    outputs: tuple[TensorRef | str, ...]


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What a rule found and wants: `matched` nodes, the anchor last, are replaced by `calls`.

    `kept` are the values of the matched nodes that others may go on reading, since a call gives them again.
    """

    matched: tuple[OpNode, ...]
    calls: tuple[NewCall, ...]
    kept: tuple[TensorRef, ...]


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A rule that matched in part: how many of its nodes, and what stands where another one is wanted."""

    num_matched: int
    reason: str


Memo = MutableMapping[InferKey, Inference]
RuleFunction = Callable[[ExecutionGraph, OpNode], "Rewrite | NearMiss | None"]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rewrite rule: `anchor` is the op of the pattern's last node, where matching starts."""

    name: str
    anchor: type[OpNode]
    apply: RuleFunction
    num_nodes: int
    benefit: int = 1


@dataclass(slots=True)
class RuleStats:
    """How often a rule fired, and why it did not where its anchor was left standing."""

    fired: int = 0
    near_misses: Counter[str] = field(default_factory=Counter)

    @property
    def tried(self) -> int:
        """The sites where it could have fired."""
        return self.fired + self.near_misses.total()

    def __str__(self) -> str:
        text = f"fired {self.fired} of {self.tried}"
        if self.near_misses:
            reason, count = self.near_misses.most_common(1)[0]
            text += f"; {self.near_misses.total()} near misses, {count} of them: {reason}"
        return text


@dataclass(slots=True)
class PassReport:
    """What a pass did to one graph. `facts` are its own figures, such as microseconds or bytes before and after."""

    name: str
    nodes_before: int
    nodes_after: int = 0
    seconds: float = 0.0
    rules: dict[str, RuleStats] = field(default_factory=dict)
    facts: dict[str, int | float | str] = field(default_factory=dict)

    @property
    def fired(self) -> int:
        return sum(stats.fired for stats in self.rules.values())

    def __str__(self) -> str:
        head = f"{self.name}: {self.nodes_before} -> {self.nodes_after} nodes in {1e3 * self.seconds:.1f} ms"
        rules = [f"{rule} {stats}" for rule, stats in self.rules.items()]
        facts = [f"{name} {round(v, 2) if isinstance(v, float) else v}" for name, v in self.facts.items()]
        return "; ".join([head, *rules, *facts])


class DeclaredPass(OptimizationPass):
    """A pass that a spec declares: generated subclasses hold the declaration, the engine classes above do the work."""

    pass_name: ClassVar[str]

    def __init__(self) -> None:
        self.report = PassReport(self.pass_name, 0)

    @property
    def name(self) -> str:
        return self.pass_name

    def apply(self, graph: ExecutionGraph) -> ExecutionGraph:
        """A transformed copy; `report` tells what was done."""
        result = graph.copy()
        self.transform(result)
        return result

    def transform(self, graph: ExecutionGraph) -> None:
        """Transforms the graph itself, for a caller that owns it; `report` tells what was done."""
        start = time.perf_counter()
        self.report = PassReport(self.pass_name, len(graph.nodes))
        if graph.stage is None or graph.stage in self.phases:
            self.run(graph)
        self.report.nodes_after = len(graph.nodes)
        self.report.seconds = time.perf_counter() - start

    @abstractmethod
    def run(self, graph: ExecutionGraph) -> None:
        """Transforms the graph in place and fills in the report."""


class RewritePass(DeclaredPass):
    """A pass of rewrite rules.

    `expect` gives, per model name (or `*`), how often the rules fire in all, as a function of the model's config. With
    `kernels`, the ops that the device has a kernel for, a rule that puts in another op does not fire: the parts of a
    fused op run one by one, as they do without the rule.
    """

    rules: ClassVar[tuple[Rule, ...]] = ()
    expect: ClassVar[Mapping[str, Callable[[Any], int]]] = {}

    def __init__(self, kernels: Container[str] | None = None) -> None:
        super().__init__()
        self.kernels = kernels

    def run(self, graph: ExecutionGraph) -> None:
        self.report.rules = {rule.name: RuleStats() for rule in self.rules}
        self._run_to_fixpoint(graph)

    def why_not_expected(self, model: str, config: Any) -> str | None:
        """How the last run differs from what the spec expects of the model, with near misses; None if it does not."""
        count = self.expect.get(model, self.expect.get("*"))
        if count is None or count(config) == self.report.fired:
            return None
        lines = [f"{self.name} fired {self.report.fired} times on {model}, expected {count(config)}"]
        for rule, stats in self.report.rules.items():
            lines += [f"  {rule}: {times} times: {reason}" for reason, times in stats.near_misses.most_common()]
        return "\n".join(lines)

    def _run_to_fixpoint(self, graph: ExecutionGraph) -> None:
        rules = sorted(self.rules, key=lambda rule: -rule.benefit)
        by_anchor: dict[type[OpNode], list[Rule]] = {}
        for rule in rules:
            by_anchor.setdefault(rule.anchor, []).append(rule)
        memo: Memo = {}
        for _ in range(MAX_ROUNDS):
            for stats in self.report.rules.values():
                stats.near_misses.clear()  # the last round has the final word
            position = {node_id: i for i, node_id in enumerate(graph.nodes)}
            anchors = [node for node in graph.nodes.values() if isinstance(node, OpNode) and type(node) in by_anchor]
            fired = sum(self._try_rules(graph, node, by_anchor[type(node)], position, memo) for node in anchors)
            if not fired:
                return

    def _try_rules(
        self, graph: ExecutionGraph, node: OpNode, rules: Sequence[Rule], position: Mapping[str, int], memo: Memo
    ) -> bool:
        for rule in rules:
            if graph.nodes.get(node.node_id) is not node:
                return False  # an earlier rewrite of this round took it
            stats = self.report.rules[rule.name]
            found = rule.apply(graph, node)
            if isinstance(found, Rewrite):
                found = self._without_kernel(found) or apply_rewrite(graph, found, position, memo) or found
            if isinstance(found, Rewrite):
                stats.fired += 1
                return True
            if isinstance(found, NearMiss):
                stats.near_misses[found.reason] += 1
        return False

    def _without_kernel(self, rewrite: Rewrite) -> NearMiss | None:
        lacking = [call.op.op for call in rewrite.calls if self.kernels is not None and call.op.op not in self.kernels]
        return NearMiss(len(rewrite.matched), f"the device has no kernel for {lacking[0]}") if lacking else None


def apply_rewrite(
    graph: ExecutionGraph, rewrite: Rewrite, position: Mapping[str, int], memo: Memo | None = None
) -> NearMiss | None:
    """Puts the calls in the place of the matched nodes, in this graph; or says why that cannot be.

    Refused are values that others still read, types that do not fit the new ops, and a place that does not exist: the
    new nodes would have to stand behind something that itself waits for a matched node.
    """
    if (reason := _why_not_replaceable(graph, rewrite, position)) is not None:
        return NearMiss(len(rewrite.matched), reason)
    try:
        nodes = _new_nodes(graph, rewrite, memo if memo is not None else {})
    except TypeMismatch as error:
        return NearMiss(len(rewrite.matched), str(error))
    try:
        graph.replace(rewrite.matched, nodes)
    except IRError as error:
        return NearMiss(len(rewrite.matched), str(error))
    return None


def _why_not_replaceable(graph: ExecutionGraph, rewrite: Rewrite, position: Mapping[str, int]) -> str | None:
    matched = {node.node_id for node in rewrite.matched}
    kept = {ref.name for ref in rewrite.kept}
    returned = {ref.name for ref in graph.outputs}
    for node in rewrite.matched:
        for ref in node.outputs:
            others = [user.node_id for user in graph.users(ref) if user.node_id not in matched]
            if ref.name not in kept and (others or ref.name in returned):
                return f"{ref.name} is also read by {others[0] if others else 'the caller'}"
    if (lost := _lost_operand(rewrite)) is not None:
        return f"the replacement reads {lost}, which it takes away"
    return _why_no_place(graph, rewrite, matched, position) or _why_not_overwritable(graph, rewrite, matched, position)


def _why_not_overwritable(
    graph: ExecutionGraph, rewrite: Rewrite, matched: set[str], position: Mapping[str, int]
) -> str | None:
    """Whether a new op that works in place would destroy what is wanted afterwards."""
    returned = {ref.name for ref in graph.outputs}
    for call in rewrite.calls:
        for operand in call.op.inplace.values():
            ref = call.inputs.get(operand)
            for name in same_memory(graph, ref.name) if isinstance(ref, TensorRef) else ():
                if name in graph.weights or name in returned:
                    what = "a weight" if name in graph.weights else "returned"
                    return f"{call.op.op} overwrites {name}, which is {what}"
                for reader in graph.users(name):
                    if reader.node_id not in matched and not _runs_before(graph, reader, matched, position):
                        return f"{call.op.op} overwrites {name}, which {reader.node_id} may read later"
    return None


def _runs_before(graph: ExecutionGraph, node: ExecutionNode, matched: set[str], position: Mapping[str, int]) -> bool:
    """Whether a matched node waits for the node, or the node is a view, which reads nothing itself."""
    if isinstance(node, OpNode) and "view" in node.tags:
        return True
    first = position.get(node.node_id, 0)
    pending = [d for node_id in matched for d in graph.nodes[node_id].dependencies if d not in matched]
    seen: set[str] = set()
    while pending:
        node_id = pending.pop()
        if node_id == node.node_id:
            return True
        if node_id not in seen and position.get(node_id, first) > first:
            seen.add(node_id)
            pending += graph.nodes[node_id].dependencies
    return False


def _lost_operand(rewrite: Rewrite) -> str | None:
    """A value of the pattern that a new op reads before one has given it again."""
    gone = {ref.name for node in rewrite.matched for ref in node.outputs}
    for call in rewrite.calls:
        for ref in call.inputs.values():
            if isinstance(ref, TensorRef) and ref.name in gone:
                return ref.name
        gone -= {wanted if isinstance(wanted, str) else wanted.name for wanted in call.outputs}
    return None


def _why_no_place(
    graph: ExecutionGraph, rewrite: Rewrite, matched: set[str], position: Mapping[str, int]
) -> str | None:
    """Whether an operand from outside waits for a matched node: then the replacement would wait for itself."""
    first = min(position.get(node_id, 0) for node_id in matched)
    pending = [d for node in rewrite.matched for d in node.dependencies if d not in matched]
    seen: set[str] = set()
    while pending:
        node_id = pending.pop()
        if node_id in matched:
            return "an operand waits for a value of the pattern itself"
        if node_id not in seen and position.get(node_id, first) >= first:  # what stands before cannot wait for it
            seen.add(node_id)
            pending += graph.nodes[node_id].dependencies
    return None


def _new_nodes(graph: ExecutionGraph, rewrite: Rewrite, memo: Memo) -> list[ExecutionNode]:
    anchor = rewrite.matched[-1]
    old = {ref.name: ref for node in rewrite.matched for ref in node.outputs}
    origins = tuple(dict.fromkeys(o for node in rewrite.matched for o in (node.origins or (node.node_id,))))
    made: dict[str, TensorRef] = {}
    nodes: list[ExecutionNode] = []
    for call in rewrite.calls:
        inputs = {name: _made(ref, made) for name, ref in call.inputs.items() if ref is not None}
        inference = _infer(call, inputs, memo)
        outputs = []
        for wanted, type_ in zip(call.outputs, inference.outputs, strict=True):
            name = wanted.name if isinstance(wanted, TensorRef) else _new_name(graph, f"{anchor.node_id}.{wanted}")
            ref = TensorRef(name, type_.shape, type_.dtype, anchor.device_id)
            if name in old and old[name].type != type_:
                raise TypeMismatch(f"{call.op.op} gives {ref}, want {old[name].type}")
            made[wanted if isinstance(wanted, str) else name] = ref
            outputs.append(ref)
        nodes.append(_node(call, anchor, inputs, outputs, inference.attrs, origins))
    if all(node.node_id != anchor.node_id for node in nodes):
        nodes[-1].node_id = anchor.node_id
    return nodes


def _made(ref: TensorRef | str, made: Mapping[str, TensorRef]) -> TensorRef:
    """An operand: a value that an earlier call makes (anew), or one of the graph."""
    return made[ref] if isinstance(ref, str) else made.get(ref.name, ref)


def _new_name(graph: ExecutionGraph, name: str) -> str:
    while graph.producer(name) is not None or name in graph.inputs or name in graph.weights:
        name += "_"
    return name


def _infer(call: NewCall, inputs: Mapping[str, TensorRef], memo: Memo) -> Inference:
    key = infer_key(call.op, tuple(inputs), list(inputs.values()), call.attrs)
    if key not in memo:
        memo[key] = call.op.resolve({name: ref.type for name, ref in inputs.items()}, call.attrs)
    return memo[key]


def _node(
    call: NewCall,
    anchor: OpNode,
    inputs: Mapping[str, TensorRef],
    outputs: list[TensorRef],
    attrs: Mapping[str, AttrValue],
    origins: tuple[str, ...],
) -> OpNode:
    names = [name for name in call.op.input_types if name in inputs]
    is_prefix = names == list(call.op.input_types)[: len(names)]
    return call.op(
        outputs[0].name,
        call.op.kind,
        [inputs[name] for name in names],
        outputs,
        device_id=anchor.device_id,
        stream_id=anchor.stream_id,
        layer_id=anchor.layer_id,
        metadata={} if is_prefix else {"operands": names},
        attrs=dict(attrs),
        block=anchor.block,
        origins=origins,
    )


Reader = TypeVar("Reader", bound=OpNode)


def reader_of(graph: ExecutionGraph, value: TensorRef, op: type[Reader]) -> Reader | None:
    """The one node of an op that reads a value; None if there is none, or more than one to choose from."""
    readers = [node for node in graph.users(value) if isinstance(node, op)]
    return readers[0] if len(readers) == 1 else None


def describe(node: ExecutionNode | None, value: TensorRef) -> str:
    """Where a value comes from, for the reason of a near miss: `x, which cast gives` or `x, an input`."""
    return f"{value.name}, which {node.op} gives" if node is not None else f"{value.name}, an input"


def has_default(node: OpNode, attr: str) -> bool:
    """Whether an attribute has the value that the op's declaration gives it, which may depend on the operands."""
    others = {name: value for name, value in node.attrs.items() if name != attr}
    types = {name: ref.type for name, ref in zip(node.operands, node.inputs, strict=True)}
    return node.attrs.get(attr) in (None, node.resolve(types, others).attrs[attr])
