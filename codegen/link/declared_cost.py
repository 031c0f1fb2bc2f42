"""Links the declared cost of an op with a hand-written `reference`."""

import ast
from collections.abc import Mapping
from contextlib import suppress

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.expr.cost import element_bytes, tensor_bytes
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.syntax import Refused, Text, parse_expression
from sageLLM.codegen.expr.types import DTYPES, size_of
from sageLLM.codegen.link.signature import Signature
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.op import Cost
from sageLLM.codegen.schema.ops import OpSpec

KV_SIZES = ("kv_size", "kv_scale")
"""Bytes of an element of the KV cache, and of the scale of a row, which depend on its form."""


def declared_cost(entry: Entry[OpSpec], signature: Signature, sink: Sink) -> Cost | None:
    """The cost as formulas of dims, `let` and element sizes, or None after a finding."""
    spec = entry.spec.cost
    if spec is None:
        return None
    names = dict(signature.scope().dims) | dict.fromkeys(spec.let)
    with suppress(Refused):
        flops = _formula(Text.of(spec.flops, entry, ("cost", "flops"), sink), names, signature.elements)
        moved = _formula(Text.of(spec.bytes, entry, ("cost", "bytes"), sink), names, signature.elements)
        reads = {name: tensor_bytes(type_) for name, type_ in signature.input_types.items()}
        writes = {name: tensor_bytes(type_) for name, type_ in signature.output_types.items()}
        return Cost(flops, moved, dict(spec.let), reads, writes)
    return None


def _formula(text: Text, names: Mapping[str, object], elements: Mapping[str, object]) -> Size:
    node = parse_expression(text)
    sizes = {**{f"{element}_size": None for element in elements}, **dict.fromkeys(KV_SIZES)}
    return size_of(_with_sizeof(node, elements), text, {**names, **sizes}, leading=True)


def _with_sizeof(node: ast.expr, elements: Mapping[str, object]) -> ast.expr:
    """The formula with `sizeof(E)` as the symbol `E_size`, or as the bytes of a fixed type."""
    match node:
        case ast.BinOp(left=left, op=operator, right=right):
            sides = (_with_sizeof(left, elements), _with_sizeof(right, elements))
            return ast.copy_location(ast.BinOp(sides[0], operator, sides[1]), node)
        case ast.Call(func=ast.Name(id="sizeof"), args=[ast.Name(id=element)], keywords=[]):
            if element in elements:
                return ast.copy_location(ast.Name(f"{element}_size"), node)
            if element in DTYPES:
                return ast.copy_location(ast.Constant(element_bytes(element).constant), node)
    return node
