"""Products that another op follows: one with a reference, which looks at the product's result while it is made.

    logits = lm_head(x, w, bias)                     a product, finished block by block
    tokens = sample(logits, temperature, ...)        follows it: it has seen every logit before the row is complete

The follower says by `kernel.follows` which of its inputs it can see that way. A target needs to know how to hand it the
blocks, and has a template for what it does when all rows are there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sageLLM.codegen.kernel.products import Product, product_of
from sageLLM.codegen.model.op import OpDef, Operand


@dataclass(frozen=True, slots=True)
class Followed:
    """A product whose `result` is an output, and the op behind it.

    `head` is the product as an op by itself; `operands` are the follower's inputs and outputs as the fused op has them,
    None where one is absent.
    """

    head: OpDef
    product: Product
    result: Operand
    follower: OpDef
    operands: tuple[Operand | None, ...]


def followed_product(op: OpDef, ops: Mapping[str, OpDef]) -> Followed | None:
    """The op as a product and its follower, or None if it is something else."""
    if len(op.fuses) < 2:
        return None
    *before, last = op.fuses
    follower = ops[last.op]
    if follower.follows is None or follower.attrs:
        return None
    args = dict(zip((o.name for o in follower.inputs), last.args, strict=False))
    names = [*(args.get(o.name) for o in follower.inputs), *last.targets]
    operands = tuple(op.operand(name) if name else None for name in names)
    result = op.operand(args[follower.follows] or "")
    made = tuple(o for o in op.outputs if o.name not in last.targets)
    if result is None or made != (result,) or any(name and not o for name, o in zip(names, operands, strict=True)):
        return None
    head = replace(op, fuses=tuple(before), outputs=made)
    product = product_of(head, ops)
    return Followed(head, product, result, follower, operands) if product and not product.groups else None
