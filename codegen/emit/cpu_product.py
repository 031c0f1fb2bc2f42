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

SEEN = "allSeen"
"""The object that looks at what a product makes."""


@dataclass(slots=True)
class ProductText(CppText):
    """Expressions that finish a product: the sums are in registers, one block for each gate."""

    product: Product | None = None
    followed: str = ""

    def _load(self, place: Place, expr: Load) -> Piece:
        if place.operand != SUMS or self.product is None:
            return super(ProductText, self)._load(place, expr)
        gate = self.product.gate_of(expr)
        return Piece(f"load(sums, Block{{{f'{gate} * PANEL' if gate else '0'}}})")

    def is_lanes(self, expr: Expr) -> bool:
        is_sum = isinstance(expr, Load) and expr.place.operand == SUMS
        return is_sum or super(ProductText, self).is_lanes(expr)

    def stored(self, place: Place, value: Expr) -> str:
        """The value on its way to its place; what follows the product looks at it."""
        text = super(ProductText, self).stored(place, value)
        if place.operand != self.followed or self.product is None:
            return text
        return f"ownSeen.with({_rows(self.product).variable}, {self.product.sweep.loop.variable}, {text})"


def product_lines(product: Product, writer: ProductText, inside: Sequence[str]) -> list[str]:
    """The call; `inside` are the lines of the sweep, which `writer` wrote."""
    groups = [loop for loop in product.finish.rows if loop.extent in product.groups]
    start = ["product(WAY, TUNING, factors,"]
    if groups:
        count, each = size_text(groups[0].extent), size_text(_rows(product).extent)
        start = [f"products(WAY, TUNING, {count}, factors,", f"        [&](int64_t) {{ return {each}; }},"]
    finish = _finish_lines(product, "[&]", inside)
    return [_factors_line(product), *start, _row_of(product, writer), *indented([*finish, "});"], 2)]


def followed_lines(product: Product, writer: ProductText, inside: Sequence[str], follower: str) -> list[str]:
    """The call, and an object of the class `follower` that looks at the results, with a part for each part of the work.

    const SampleFollower allSeen(S, allParts.columns);
    product_by_part(WAY, TUNING, factors, allParts, ..., [&](int64_t iPart) {
        return [&, ownSeen = allSeen.part(iPart)](int64_t iS, auto iV, const float* sums) {
            store(logits + iS * logits_S, iV, ownSeen.with(iS, iV, to<E>(load(sums, Block{0}))));
        };
    });
    """
    finish = _finish_lines(product, f"return [&, ownSeen = {SEEN}.part(iPart)]", inside)
    return [
        _factors_line(product),
        "const Parts allParts = parts_of(TUNING, factors);",
        f"const {follower} {SEEN}({size_text(_rows(product).extent)}, allParts.columns);",
        "product_by_part(WAY, TUNING, factors, allParts,",
        _row_of(product, writer),
        *indented(["[&](int64_t iPart) {", *indented([*finish, "};"]), "});"], 2),
    ]


def indented(lines: Sequence[str], by: int = 1) -> list[str]:
    return [f"{'    ' * by}{line}" for line in lines]


def _rows(product: Product) -> Loop:
    rows = [loop for loop in product.finish.rows if loop.extent not in product.groups]
    is_known = len(rows) == 1 and len(product.finish.rows) == len(product.groups) + 1
    assert is_known, "a product has one dim of rows beside its groups"
    return rows[0]


def _factors_line(product: Product) -> str:
    """`const Factors<E> factors = {R, K, N, 1, w};`"""
    extents = (_rows(product).extent, product.inner, product.sweep.loop.extent)
    sizes = ", ".join(map(size_text, extents))
    return f"const Factors<{product.w.type.element}> factors = {{{sizes}, {product.gates}, {product.w.name}}};"


def _finish_lines(product: Product, captures: str, inside: Sequence[str]) -> list[str]:
    """The lambda of a block of sums, but for its end."""
    variable = product.sweep.loop.variable
    return [f"{captures}({_parameters(product)}, auto {variable}, const float* sums) {{", *indented(inside)]


def _parameters(product: Product) -> str:
    """The group, if there are any, and the row."""
    groups = [loop for loop in product.finish.rows if loop.extent in product.groups]
    return ", ".join(f"int64_t {loop.variable}" for loop in (*groups, _rows(product)))


def _row_of(product: Product, writer: ProductText) -> str:
    """`[&](int64_t iR) { return x + iR * x_R; },`"""
    positions = {loop.extent: Affine.of(loop.variable) for loop in product.finish.rows}
    positions[product.inner] = Affine.of(INNER)
    place = Place(product.x.name, tuple(positions[dim] for dim in product.x.type.dims))
    row = ProductText(writer.operands, {}, {}, Loop(INNER, product.inner))
    return f"        [&]({_parameters(product)}) {{ return {row.address(place)[0]}; }},"
