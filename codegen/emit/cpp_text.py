"""Writes the expressions of row programs as C++, in terms of `runtime/kernels/cpu/sage.h`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sageLLM.codegen.expr.size import Size, formula
from sageLLM.codegen.expr.tree import (
    AttrRef,
    Binary,
    Cast,
    DimRef,
    Expr,
    IfPresent,
    Number,
    Ref,
    Select,
    Unary,
    children,
)
from sageLLM.codegen.expr.types import INTEGERS, LITERALS
from sageLLM.codegen.kernel.rows import Affine, Load, Location, Loop

CPP_TYPES = {"bool": "bool", "i8": "int8_t", "i32": "int32_t", "i64": "int64_t", "f16": "f16", "bf16": "bf16",
             "f32": "float", "f64": "double"}  # fmt: skip
_PRECEDENCE = {"or": 1, "and": 2, "|": 1, "&": 2, "==": 3, "!=": 3, "<": 4, "<=": 4, ">": 4, ">=": 4, "+": 5, "-": 5,
               "*": 6, "/": 6}  # fmt: skip
_ATOM, _UNARY, _CONDITIONAL = 9, 8, 0
_CALLS = {"//": "floor_divide", "%": "floor_remainder", "**": "pow", "min": "minimum", "max": "maximum"}
_EXACT = ("min", "max", "neg", "abs", "relu", "floor", "round")
"""Operations that return an exact element, so that no rounding is needed."""


_KEYWORDS = """alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const constexpr
    const_cast continue decltype default delete do double dynamic_cast else enum explicit export extern false float
    for friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or or_eq private
    protected public register reinterpret_cast return short signed sizeof static static_assert static_cast struct switch
    template this thread_local throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t
    while xor xor_eq int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t size_t math_errhandling"""
_HEADER = """abs active_lanes args attend attrs bf16 broadcast call epilogue erf exp exp2 f16 f32 filters floor
    floor_divide floor_remainder fma gemm gemm_by_part gemm_parts grouped_gemm hooks keys load load_strided log
    logical_not mask maximum minimum parallel_for_rows part part_epilogue parts pow relu round routes routing rsqrt sage
    scratch sigmoid sizes sqrt store store_element store_strided sums sweep tanh tensors to where widen"""
RESERVED = frozenset(f"{_KEYWORDS} {_HEADER}".split())


def cpp_name(name: str) -> str:
    """The name of a spec's value in C++, with a trailing underscore if the bare one has a meaning there."""
    return f"{name}_" if name.rstrip("_") in RESERVED else name


class Piece(NamedTuple):
    """C++ text, and the precedence of its outermost operator."""

    text: str
    precedence: int = _ATOM


def size_text(size: Size) -> str:
    """`Dr / 2`: sizes are integers, so that `/` divides them exactly as `//` does."""
    return formula(size).replace("//", "/")


def number_text(value: object, *, is_float: bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    assert isinstance(value, int | float), f"expected a number, got {value!r}"
    return f"{float(value)!r}f" if is_float else str(value)


@dataclass(slots=True)
class CppText:
    """Expressions at one point of a kernel: in a sweep over `loop`, or (without one) for the row.

    `operands` maps each operand to the names of its strides, `optional` each optional operand or attr to the condition
    that it is present. `names` renames values that have the name of an operand, and `lanes` are the vector values.
    """

    operands: Mapping[str, Sequence[str]]
    optional: Mapping[str, str]
    names: Mapping[str, str]
    loop: Loop | None = None
    lanes: set[str] = field(default_factory=set)

    def text(self, expr: Expr) -> str:
        return self._piece(expr, self.is_float(expr)).text

    def stored(self, location: Location, value: Expr) -> str:
        """The value that is written to a location."""
        return self.text(value)

    def is_float(self, expr: Expr) -> bool:
        return expr.type.element not in (*INTEGERS, "bool", "int", "truth", "str")

    def is_lanes(self, expr: Expr) -> bool:
        """Whether the value has a lane for each element of the sweep's block."""
        if isinstance(expr, Load):
            return self.loop is not None and any(self.loop.variable in at.variables for at in expr.location.index)
        if isinstance(expr, Ref):
            return expr.name in self.lanes
        return any(self.is_lanes(child) for child in children(expr))

    def _piece(self, expr: Expr, is_float: bool) -> Piece:
        match expr:
            case Number(value=value):
                return Piece(number_text(value, is_float=is_float))
            case AttrRef(name=name):
                return self._widened(cpp_name(name), expr, is_float)
            case DimRef(size=size):
                text = size_text(size)
                return self._widened(text if text.isidentifier() else f"({text})", expr, is_float)
            case Ref(name=name):
                return Piece(self.names.get(name, cpp_name(name)))
            case Load(location=location):
                return self._load(location, expr)
            case Unary():
                return self._unary(expr, is_float)
            case Binary():
                return self._binary(expr, is_float)
            case Cast():
                return self._cast(expr)
            case Select(condition=condition, a=a, b=b):
                parts = [self.text(condition), self._piece(a, is_float).text, self._piece(b, is_float).text]
                return Piece(f"where({', '.join(parts)})")
            case IfPresent():
                return self._if_present(expr, is_float)
        raise AssertionError(f"a row program holds no {type(expr).__name__}")

    def _widened(self, text: str, expr: Expr, is_float: bool) -> Piece:
        return Piece(f"(float){text}", _UNARY) if is_float and expr.type.element == "int" else Piece(text)

    def _unary(self, expr: Unary, is_float: bool) -> Piece:
        if expr.op == "neg":
            return Piece(f"-{self._wrapped(expr.x, _UNARY, is_float)}", _UNARY)
        if expr.op == "not":
            return Piece(f"logical_not({self.text(expr.x)})")
        return self._rounded(expr, Piece(f"{expr.op}({self._piece(expr.x, is_float).text})"))

    def _binary(self, expr: Binary, is_float: bool) -> Piece:
        inside = is_float if expr.type.element not in ("bool", "truth") else self._compares_floats(expr)
        if expr.op in _CALLS:
            parts = f"{self._piece(expr.a, inside).text}, {self._piece(expr.b, inside).text}"
            return self._rounded(expr, Piece(f"{_CALLS[expr.op]}({parts})"))
        if expr.op in ("and", "or") and self.is_lanes(expr.a) != self.is_lanes(expr.b):
            sides = [
                self._wrapped(s, 3, False) if self.is_lanes(s) else f"mask({self.text(s)})" for s in (expr.a, expr.b)
            ]
            return Piece({"and": " & ", "or": " | "}[expr.op].join(sides), _PRECEDENCE[expr.op])
        op = {"and": "&", "or": "|"}.get(expr.op, expr.op)
        binds = _PRECEDENCE[op]
        left, right = self._wrapped(expr.a, binds, inside), self._wrapped(expr.b, binds + 1, inside)
        return self._rounded(expr, Piece(f"{left} {op} {right}", binds))

    def _compares_floats(self, expr: Binary) -> bool:
        return self.is_float(expr.a) or self.is_float(expr.b)

    def _wrapped(self, expr: Expr, binds: int, is_float: bool) -> str:
        piece = self._piece(expr, is_float)
        return piece.text if piece.precedence >= binds else f"({piece.text})"

    def _rounded(self, expr: Unary | Binary, piece: Piece) -> Piece:
        """Arithmetic on elements is done in float32 and rounded to the element type."""
        element = expr.type.element
        is_narrow = element not in ("f32", *LITERALS, *INTEGERS, "bool")
        return Piece(f"to<{self.cpp_type(element)}>({piece.text})") if is_narrow and expr.op not in _EXACT else piece

    def cpp_type(self, element: str) -> str:
        return CPP_TYPES.get(element, element)

    def _cast(self, expr: Cast) -> Piece:
        element, source = expr.type.element, expr.x.type.element
        if element in INTEGERS:
            return self._piece(expr.x, is_float=False)
        inner = self._piece(expr.x, is_float=True)
        if source in INTEGERS:
            inner = Piece(f"(float){self._wrapped(expr.x, _UNARY, False)}", _UNARY)
        if element in ("f32", source):
            return inner
        return Piece(f"to<{self.cpp_type(element)}>({inner.text})")

    def _if_present(self, expr: IfPresent, is_float: bool) -> Piece:
        a, b = (self._piece(side, is_float).text for side in (expr.a, expr.b))
        if self.is_lanes(expr.a) != self.is_lanes(expr.b):
            fill = "broadcast" if is_float else "mask"
            a, b = (text if self.is_lanes(side) else f"{fill}({text})" for text, side in ((a, expr.a), (b, expr.b)))
        return Piece(f"{self.optional[expr.name]} ? {a} : {b}", _CONDITIONAL)

    # locations

    def _load(self, location: Location, expr: Load) -> Piece:
        at, step = self.address(location)
        if expr.type.element in (*INTEGERS, "bool"):
            return Piece(self._element(location))
        if step is None:
            return Piece(f"widen({self._element(location)})")
        assert self.loop is not None, "only a sweep loads lanes"
        if step == "1":
            return Piece(f"load({at}, {self.loop.variable})")
        return Piece(f"load_strided({step}, {at}, {self.loop.variable})")

    def _element(self, location: Location) -> str:
        return f"{cpp_name(location.operand)}[{' + '.join(self._terms(location)) or '0'}]"

    def address(self, location: Location) -> tuple[str, str | None]:
        """`x + i_R * x_R`, and its stride along the sweep: "1", another size, or None if the sweep does not move it."""
        return " + ".join([cpp_name(location.operand), *self._terms(location, without=self._variable)]), self._step(
            location
        )

    @property
    def _variable(self) -> str | None:
        return self.loop.variable if self.loop else None

    def _terms(self, location: Location, without: str | None = None) -> list[str]:
        strides = [*self.operands[location.operand], ""]
        return [
            f"{position} * {stride}" if stride else position
            for at, stride in zip(location.index, strides, strict=True)
            if (position := affine_text(at, without, bare=not stride)) != "0"
        ]

    def _step(self, location: Location) -> str | None:
        parts = []
        for at, stride in zip(location.index, [*self.operands[location.operand], ""], strict=True):
            factor = dict(at.terms).get(self._variable or "")
            if factor is not None:
                text = size_text(factor)
                parts.append(stride if text == "1" and stride else f"{text} * {stride}" if stride else text)
        return " + ".join(parts) or None


def affine_text(at: Affine, without: str | None, *, bare: bool) -> str:
    """`i_N * D + Dr / 2`, without one variable; in parentheses unless `bare` allows a sum."""
    terms = [name if size == Size.of(1) else _product(name, size) for name, size in at.terms if name != without]
    if at.offset != Size.of(0):
        terms.append(size_text(at.offset))
    text = " + ".join(terms) or "0"
    is_simple = text.isidentifier() or text.isdigit() or bare
    return text if is_simple else f"({text})"


def _product(name: str, size: Size) -> str:
    text = size_text(size)
    return f"{name} * {text}" if text.isidentifier() or text.isdigit() else f"{name} * ({text})"
