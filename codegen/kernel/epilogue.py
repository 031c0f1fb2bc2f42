"""GEMMs with another op as their epilogue: an op with a reference, which reads the GEMM's result block by block.

    logits = lm_head(x, w, bias)                     the producer: a GEMM, computed block by block
    tokens = sample(logits, temperature, ...)        the consumer: has read every logit when the row is complete

`kernel.epilogue_of` of the consumer names the input that it can read that way. A target passes it the blocks, and has a
template for the work that is left when all rows are complete.
"""

from dataclasses import dataclass, replace

from sageLLM.codegen.kernel.gemm import Gemm, gemm_of
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.model.op import OpDef, Operand


@dataclass(frozen=True, slots=True)
class FusedEpilogue:
    """A fused op that is a GEMM, `result`, which is also an output, and the op that consumes it.

    `producer` is the GEMM as an op by itself; `operands` are the consumer's inputs and outputs under their names in the
    fused op, None for an absent one.
    """

    producer: OpDef
    gemm: Gemm
    result: Operand
    consumer: OpDef
    operands: tuple[Operand | None, ...]


def fused_epilogue_of(op: OpDef, programs: Programs) -> FusedEpilogue | None:
    """The op as a GEMM and its consumer, or None for any other op."""
    if len(op.fuses) < 2:
        return None
    *before, last = op.fuses
    consumer = programs.ops[last.op]
    if consumer.epilogue_of is None or consumer.attrs:
        return None
    args = dict(zip((o.name for o in consumer.inputs), last.args, strict=False))
    names = [*(args.get(o.name) for o in consumer.inputs), *last.targets]
    operands = tuple(op.operand(name) if name else None for name in names)
    result = op.operand(args[consumer.epilogue_of] or "")
    outputs = tuple(o for o in op.outputs if o.name not in last.targets)
    if result is None or outputs != (result,) or any(name and not o for name, o in zip(names, operands, strict=True)):
        return None
    producer = replace(op, fuses=tuple(before), outputs=outputs)
    gemm = gemm_of(producer, programs)
    return FusedEpilogue(producer, gemm, result, consumer, operands) if gemm and not gemm.groups else None
