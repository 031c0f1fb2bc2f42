"""Emits products on the CPU: the blocked loops of `runtime/kernels/cpu/products.h`, around the op's own equations.

const Factors<E> factors = {R, K, N, 1, w};
product(WAY, TUNING, factors, [&](int64_t iR) { return x + iR * x_R; }, [&](int64_t iR, auto iN, const float* sums) {
    store(y + iR * y_R, iN, to<E>(load(sums, Block{0})));
});
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sageLLM.codegen.emit.cpp_text import CppText, Piece, size_text
from sageLLM.codegen.expr.tree import Expr
from sageLLM.codegen.kernel.products import SUMS, Product
from sageLLM.codegen.kernel.rows import Affine, Load, Loop, Place

INNER = "iInner"
"""The variable along the summed dim: it only says that an address has to leave that dim out."""


@dataclass(slots=True)
class ProductText(CppText):
    """Expressions that finish a product: the sums are in registers, one block for each gate."""

    product: Product | None = None

    def _load(self, place: Place, expr: Load) -> Piece:
        if place.operand != SUMS or self.product is None:
            return super(ProductText, self)._load(place, expr)
        gate = self.product.gate_of(expr)
        return Piece(f"load(sums, Block{{{f'{gate} * PANEL' if gate else '0'}}})")

    def is_lanes(self, expr: Expr) -> bool:
        is_sum = isinstance(expr, Load) and expr.place.operand == SUMS
        return is_sum or super(ProductText, self).is_lanes(expr)


def product_lines(product: Product, writer: ProductText, inside: Sequence[str]) -> list[str]:
    """The call; `inside` are the lines of the sweep, which `writer` wrote."""
    loops = product.finish.rows
    groups = [loop for loop in loops if loop.extent in product.groups]
    rows = [loop for loop in loops if loop.extent not in product.groups]
    assert len(rows) == 1 and len(groups) == len(product.groups), "a product has one dim of rows beside its groups"
    sizes = ", ".join(size_text(size) for size in (rows[0].extent, product.inner, product.sweep.loop.extent))
    lines = [f"const Factors<{product.w.type.element}> factors = {{{sizes}, {product.gates}, {product.w.name}}};"]
    names = ", ".join(f"int64_t {loop.variable}" for loop in (*groups, *rows))
    start = ["product(WAY, TUNING, factors,"]
    if groups:
        count, each = size_text(groups[0].extent), size_text(rows[0].extent)
        start = [f"products(WAY, TUNING, {count}, factors,", f"        [&](int64_t) {{ return {each}; }},"]
    return [
        *lines,
        *start,
        f"        [&]({names}) {{ return {_row_of(product, writer, loops)}; }},",
        f"        [&]({names}, auto {product.sweep.loop.variable}, const float* sums) {{",
        *(f"            {line}" for line in inside),
        "        });",
    ]


def _row_of(product: Product, writer: ProductText, loops: Sequence[Loop]) -> str:
    """`x + iR * x_R`."""
    positions = {loop.extent: Affine.of(loop.variable) for loop in loops} | {product.inner: Affine.of(INNER)}
    place = Place(product.x.name, tuple(positions[dim] for dim in product.x.type.dims))
    row = ProductText(writer.operands, {}, {}, Loop(INNER, product.inner))
    return row.address(place)[0]
