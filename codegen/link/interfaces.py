"""Interfaces of ops: ops as models and passes see them, without equations and references.

A model need not be linked again if only the equations of its ops changed. Linking uses one property that depends on
equations, the state of results on one rank of a tensor-parallel group; these calls are recorded with their results.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from typing import Any

from sageLLM.codegen.diagnostics import Span
from sageLLM.codegen.expr.partial_sums import SumState
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.facts import digest
from sageLLM.codegen.link.partial_sums import Arguments, known_states, result_states
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.op import Cost, OpDef
from sageLLM.codegen.schema.ops import OpSpec

VISIBLE = ("phases", "tags", "tests")
"""Fields of an entry that stay visible. The others are linked, or concern kernels and docs only."""

NO_COST = Cost(Size.of(0), Size.of(0), {}, {}, {})


def interface_of(op: OpDef) -> OpDef:
    """The op without equations, cost, reference, kernels and prose. `fuses` stays: rules are derived from it."""
    visible = OpSpec.model_construct(**{name: getattr(op.entry.spec, name) for name in VISIBLE})
    return replace(
        op,
        entry=Entry(op.entry.name, visible, op.entry.doc, op.entry.path),
        inputs=tuple(replace(operand, doc=None) for operand in op.inputs),
        outputs=tuple(replace(operand, doc=None) for operand in op.outputs),
        attrs=tuple(replace(attr, doc=None) for attr in op.attrs),
        cost=NO_COST,
        program=None,
        reference=None,
        triton=None,
    )


def interface_digest(op: OpDef) -> str:
    """A digest of everything visible in `interface_of`, except locations in the text."""
    view = interface_of(op)
    spec, shown = view.entry.spec, [field.name for field in fields(view) if field.name != "entry"]
    facts = [view.entry.doc.file, spec.phases, spec.tags, spec.tests.cases if spec.tests else None]
    return digest([facts, [plain(getattr(view, name)) for name in shown]])


def plain(value: Any) -> Any:
    """A linked value as JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return [[plain(key), plain(inner)] for key, inner in value.items()]
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, Fraction | Span):
        return str(value) if isinstance(value, Fraction) else None
    assert is_dataclass(value) and not isinstance(value, type), f"no digest of a {type(value).__name__}"
    return [type(value).__name__, *(plain(getattr(value, field.name)) for field in fields(value))]


class Interfaces(Mapping[str, OpDef]):
    """Interfaces of ops by name, for one reader. Records every lookup, found or not, and every derived state."""

    def __init__(self, ops: Mapping[str, OpDef], views: dict[str, OpDef] | None = None) -> None:
        self._ops = ops
        self._views = {} if views is None else views
        self.names: set[str] = set()
        self.is_listed = False
        self.states: list[Any] = []
        """[op, states of arguments, divided sizes, states of results] per call; [op] for a fused op."""

    def __getitem__(self, name: str) -> OpDef:
        self.names.add(name)
        if name not in self._views:
            self._views[name] = interface_of(self._ops[name])
        return self._views[name]

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return name in self._ops

    def __iter__(self) -> Iterator[str]:
        self.is_listed = True
        return iter(self._ops)

    def __len__(self) -> int:
        self.is_listed = True
        return len(self._ops)

    def is_still(self, name: str, op: OpDef | None) -> bool:
        """Whether a name refers to the same op, or to none, as in another table."""
        return self._ops.get(name) is op

    def looked_up(self) -> dict[str, OpDef | None]:
        """The ops that were looked up; None for unknown names."""
        return {name: self._ops.get(name) for name in self.names}

    def result_states(
        self, name: str, arguments: Arguments, dims: Mapping[str, Size], divides: frozenset[str]
    ) -> tuple[SumState, ...]:
        """See `sageLLM.codegen.link.partial_sums.result_states`."""
        divided: dict[str, bool] = {}
        op = self._ops[name]
        results = result_states(op, arguments, dims, divides, self._ops, divided)
        states = {operand: [argument.state.value, argument.is_certain] for operand, argument in arguments.items()}
        call = [name] if op.fuses else [name, states, divided, [state.value for state in results]]
        if call not in self.states:
            self.states.append(call)
        return results


def has_same_results(op: OpDef, call: Sequence[Any]) -> bool:
    """Whether a recorded call has the same result states after a change of the op."""
    if len(call) == 1:
        return False
    _, states, divided, results = call
    found = known_states(op, {name: (state, is_certain) for name, (state, is_certain) in states.items()}, divided)
    return found is not None and [state.value for state in found] == results
