"""Expert parallelism: the weights of a layout with a slice per expert, and the calls that number a rank's experts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.model.layout import ModelDef, OpCall, Statement, WeightDef, plain_statements

LOCAL_EXPERTS = "local_experts"
TAG = "experts"
"""The tag of ops with the operands `experts`, `w` and `bias`, which have a slice per expert along their first dim."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The weights with a slice per expert as (block, name), and the sizes that tensor parallelism divides."""

    names: frozenset[tuple[str | None, str]] = frozenset()
    divides: frozenset[str] = frozenset()

    def has(self, weight: WeightDef) -> bool:
        return (weight.block, weight.name) in self.names

    def local(self, text: str, size: Size, dim: int) -> str:
        """A size on one rank as Python text: with whole experts, those of the rank, and sizes that are not divided."""
        if dim == 0:
            return f"{text} // c.ep"
        if not set(size.symbols) & self.divides:
            return text
        return f"({text}) * c.ep" if " + " in text or " - " in text else f"{text} * c.ep"


NO_EXPERTS = ExpertWeights()


def expert_weights_of(model: ModelDef) -> ExpertWeights:
    """The weights that ops with the tag read."""
    found = {
        (block.name, arg)
        for block in model.blocks.values()
        for call in expert_calls(block.body)
        for operand, arg in zip(call.op.inputs, call.args, strict=False)
        if operand.name in ("w", "bias") and arg is not None
    }
    sharded = {(w.block, w.name) for block in model.blocks.values() for w in block.weights if w.shard is not None}
    return ExpertWeights(frozenset(found & sharded), frozenset(model.divides))


def expert_numbers(model: ModelDef) -> dict[str, Size]:
    """The values with the experts of every token, and the number of experts."""
    found: dict[str, Size] = {}
    for block in model.blocks.values():
        weights = {weight.name: weight for weight in block.weights}
        for call in expert_calls(block.body):
            args = dict(zip((operand.name for operand in call.op.inputs), call.args, strict=False))
            name, weight = args.get("experts"), weights.get(args.get("w") or "")
            if name is not None and weight is not None:
                found[name] = weight.dims[0]
    return found


def expert_calls(body: Iterable[Statement]) -> Iterator[OpCall]:
    for statement in plain_statements(body):
        if isinstance(statement, OpCall) and TAG in statement.op.tags:
            yield statement
