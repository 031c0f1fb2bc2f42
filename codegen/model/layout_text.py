"""Prints a linked layout as text, with `extends`, patches and derived facts applied."""

from collections.abc import Iterable, Iterator

from sageLLM.codegen.model.layout import (
    Attend,
    BlockCall,
    BlockDef,
    CheckpointDef,
    Choose,
    Condition,
    ModelDef,
    OpCall,
    Repeat,
    ShardDef,
    Statement,
    WeightDef,
)
from sageLLM.codegen.model.source import PartDef


def layout_text(model: ModelDef) -> str:
    """The complete layout, one line per fact, in a stable form for snapshots and reviews."""
    return "\n".join(_lines(model)) + "\n"


def _lines(model: ModelDef) -> Iterator[str]:
    yield f"model {model.name}: {', '.join(model.checkpoints.architectures)}"
    yield from _checkpoints(model.checkpoints)
    for one in model.config.values():
        source = " or ".join(one.keys) or "constant"
        default = f" = {one.default}" if one.default is not None else ""
        other = f", null = {one.if_null.default}" if one.if_null is not None else ""
        list_ = {"layers": "[L]", "list": "[]", None: ""}[one.items]
        other += "".join(f", {text} = {number}" for text, number in one.texts)
        yield f"config {one.name}: {one.type}{list_}{'?' if one.is_optional else ''} from {source}{default}{other}"
    yield from (f"check {check.text}" for check in model.checks)
    for rope in model.ropes:
        suffix = f" {rope.name}" if rope.name else ""
        base = f" base={rope.formula}" if rope.formula else ""
        mrope = " mrope" if rope.is_mrope else ""
        yield f"rope{suffix}{base} dim={rope.dim} {rope.layout} scaling={', '.join(rope.allow)}{mrope}"
        yield from (f"rope{suffix} default {key} = {value}" for key, value in rope.default)
        yield from ((f"rope{suffix} original = {rope.original}",) if rope.original is not None else ())
    if model.alibi:
        yield f"alibi heads={model.alibi.heads} max_bias={model.alibi.max_bias}"
    shapes = [f"{name}=[{', '.join(map(str, shape))}]" for name, shape in (("k", model.cache.k), ("v", model.cache.v))]
    yield f"cache {' '.join(shapes)}{' in one' if model.cache.is_shared else ''}"
    yield f"divided {', '.join(model.divides) or 'nothing'}"
    yield from (_weight(weight) for weight in model.weights)
    for block in model.blocks.values():
        yield from _block(block)
    yield "program"
    for item in model.program:
        if isinstance(item, Repeat):
            yield f"  for {item.index} < {item.count} carrying {', '.join(item.carry)}"
            yield from _body(item.body, "    ")
        else:
            yield from _body((item,), "  ")
    yield f"  return {', '.join(model.returns)}"
    for role, value in (("hidden", model.results.hidden), ("pooled", model.results.pooled)):
        yield from [f"{role} {value}"] if value else []
    if len(model.phases) == 1:
        yield f"phases {', '.join(model.phases)}"


def _block(block: BlockDef) -> Iterator[str]:
    args = ", ".join(f"{name}: {type_}" for name, type_ in block.args.items())
    kinds = ", ".join(f"{phase}={kind}" for phase, kind in block.op_types.items())
    yield f"block {block.name}({args}) {kinds}"
    yield from (f"  {_weight(weight)}" for weight in block.weights)
    yield from _body(block.body, "  ")
    results = zip(block.returns, block.result_types, block.partial, strict=True)
    shown = [f"{name}: {type_}{' partial' if is_partial else ''}" for name, type_, is_partial in results]
    yield f"  return {', '.join(shown)}"


def _body(body: Iterable[Statement], indent: str) -> Iterator[str]:
    for statement in body:
        if isinstance(statement, Attend):
            yield f"{indent}{_call(statement.store)}"
            yield from (f"{indent}{phase}: {_call(call)}" for phase, call in statement.by_phase.items())
        elif isinstance(statement, Choose):
            for branch in statement.branches:
                yield f"{indent}when {branch.when.source}" if branch.when is not None else f"{indent}otherwise"
                yield from _body(branch.body, f"{indent}  ")
        else:
            yield f"{indent}{_call(statement)}"


def _when(condition: Condition | None) -> str:
    return f" when {condition.source}" if condition is not None else ""


def _checkpoints(found: CheckpointDef) -> Iterator[str]:
    if found.root:
        types = f" with model_type {' or '.join(found.model_types)}" if found.model_types else ""
        yield f"root {found.root}{types}{', or flat' if found.is_flat else ''}"
    yield from (f"names {name}: {', '.join(map(repr, stored))}" for name, stored in found.renamed.items())


def _weight(weight: WeightDef) -> str:
    facts = [
        _shard(weight.shard) if weight.shard else "",
        f"tied to {weight.tied_to}{_when(weight.tied_when)}" if weight.tied_to else "",
        f"when {weight.when.source}" if weight.when else "",
    ]
    parts = " + ".join(map(_part, weight.parts))
    return "; ".join([f"weight {weight.name}: {weight.type} <- {parts}", *filter(None, facts)])


def _shard(shard: ShardDef) -> str:
    segments = f" as {' | '.join(map(str, shard.segments))}" if shard.segments else ""
    return f"{shard.kind} of dim {shard.dim}{segments}{f' then {shard.then}' if shard.then else ''}"


def _part(part: PartDef) -> str:
    """`name[shape]`, how it is rearranged (`as [axes], slices, to [dims]`), and its offset in the weight."""
    words = f"{part.hf}[{', '.join(map(str, part.shape))}]"
    if not part.is_plain:
        cut = "".join(f" {axis}={start}:{stop}" for axis, start, stop in part.take)
        words += f" as [{', '.join(map(str, part.axes))}]{cut} to {list(map(list, part.groups))}"
    starts = [f"dim {dim} at {start}" for dim, start in enumerate(part.at) if start.terms]
    stack = [f"for e < {part.stacked} of dim {part.stacked_dim}"] if part.stacked else []
    return " ".join([words, *stack, *starts])


def _call(call: OpCall | BlockCall) -> str:
    types = ", ".join(f"{name}: {type_}" for name, type_ in zip(call.targets, call.types, strict=True))
    if isinstance(call, BlockCall):
        reduced = f"; all_reduce {', '.join(call.reduced)}" if call.reduced else ""
        return f"{types} = {call.block}({', '.join(call.args)}){reduced}"
    args = [*(name or "-" for name in call.args), *(f"{name}={text}" for name, text in call.attrs)]
    return f"{types} = {call.op.name}({', '.join(args)}){f'; {call.reduce}' if call.reduce else ''}"
