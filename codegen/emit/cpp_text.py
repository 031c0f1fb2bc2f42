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
from sageLLM.codegen.kernel.rows import Affine, Load, Location, Loop, Selected

CPP_TYPES = {"bool": "bool", "i8": "int8_t", "i32": "int32_t", "i64": "int64_t", "f16": "f16", "bf16": "bf16",
             "f32": "float", "f64": "double"}  # fmt: skip
ROOTS: Mapping[object, str] = {0.5: "sqrt", -0.5: "rsqrt"}
"""Exponents for which torch calls a function, which differs from a power at -inf."""
_PRECEDENCE = {"or": 1, "and": 2, "|": 1, "&": 2, "==": 3, "!=": 3, "<": 4, "<=": 4, ">": 4, ">=": 4, "+": 5, "-": 5,
               "*": 6, "/": 6}  # fmt: skip
_ATOM, _UNARY, _CONDITIONAL = 9, 8, 0
_CALLS = {"//": "floor_divide", "%": "floor_remainder", "**": "pow", "min": "minimum", "max": "maximum"}
_INTEGER_CALLS = {**_CALLS, "+": "add", "-": "subtract", "*": "multiply", "**": "power"}
_VECTORS = {"bool": "mask", "truth": "mask", "i8": "ints", "i32": "ints", "int": "ints", "i64": "longs"}
"""Functions that make a vector of a number, by element type."""
_EXACT = ("min", "max", "neg", "abs", "relu", "floor", "round")
"""Operations that return an exact element, so that no rounding is needed."""


_KEYWORDS = """alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const constexpr
    const_cast continue decltype default delete do double dynamic_cast else enum explicit export extern false float
    for friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or or_eq private
    protected public register reinterpret_cast return short signed sizeof static static_assert static_cast struct switch
    template this thread_local throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t
    while xor xor_eq int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t size_t errno math_errhandling"""
_HEADER = """abs active_lanes add args attend attrs bf16 broadcast call condition epilogue erf exp exp2 f16 f32
    filters floats floor floor_divide floor_remainder fma gemm gemm_by_part gemm_of_computed_rows gemm_parts
    grouped_gemm hooks ints keys load load_strided log logical_not longs mask maximum minimum multiply negate
    parallel_for_reduced_rows parallel_for_rows part part_epilogue parts pow power relu round routes routing rsqrt sage
    scratch sigmoid sizes sqrt store store_element store_strided subtract sums sweep tanh tensors to where widen wrap"""
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

    Integers of a sweep are vectors (`integers.h`), those of a row are int64_t. In an index (`is_index`) and in hooks,
    where `integer` is int32_t, they are positions, which cannot overflow. `operands` maps each operand to the names of
    its strides, `optional` each optional operand or attr to the condition that it is present. `names` renames values
    that have the name of an operand, and `lanes` are the vector values.
    """

    operands: Mapping[str, Sequence[str]]
    optional: Mapping[str, str]
    names: Mapping[str, str]
    loop: Loop | None = None
    lanes: set[str] = field(default_factory=set)
    integer: str = "int64_t"
    is_index: bool = False
    selections: Mapping[str, str] = field(default_factory=dict)  # the variable of each selection of the row

    def text(self, expr: Expr) -> str:
        return self._piece(expr, self.is_float(expr)).text

    def stored(self, location: Location, value: Expr) -> str:
        """The value that is written to the elements of a sweep."""
        _, step = self.address(location)
        return self.text(value) if self.is_float(value) and step == "1" else self.lanes_text(value)

    def lanes_text(self, expr: Expr, is_float: bool | None = None) -> str:
        """The value as a vector, also if it is the same for all elements."""
        is_float = self.is_float(expr) if is_float is None else is_float
        text = self._piece(expr, is_float).text
        if self.is_lanes(expr):
            return text
        return f"{'broadcast' if is_float else _VECTORS.get(expr.type.element, 'ints')}({text})"

    def is_float(self, expr: Expr) -> bool:
        return expr.type.element not in (*INTEGERS, "bool", "int", "truth", "str")

    def is_lanes(self, expr: Expr) -> bool:
        """Whether the value has a lane for each element of the sweep's block."""
        if isinstance(expr, Load):
            return self.loop is not None and any(self.loop.variable in at.variables for at in expr.location.index)
        if isinstance(expr, Ref):
            return expr.name in self.lanes
        if isinstance(expr, Selected):
            return True
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
            case Selected(selection=selection, part=part, variable=variable):
                return Piece(f"load({self.selections[selection]}.{part}(), {variable})")
            case Unary():
                return self._unary(expr, is_float)
            case Binary():
                return self._binary(expr, is_float)
            case Cast():
                return self._cast(expr)
            case Select():
                return self._select(expr, is_float)
            case IfPresent():
                return self._if_present(expr, is_float)
        raise AssertionError(f"a row program holds no {type(expr).__name__}")

    def _widened(self, text: str, expr: Expr, is_float: bool) -> Piece:
        return Piece(f"(float){text}", _UNARY) if is_float and expr.type.element == "int" else Piece(text)

    def _select(self, expr: Select, is_float: bool) -> Piece:
        sides = (expr.a, expr.b)
        if is_float or not self.is_lanes(expr):
            values = [self._piece(side, is_float).text for side in sides]
        else:
            values = [self._lanes_of(side, expr.type.element) for side in sides]
        return Piece(f"where({self.text(expr.condition)}, {', '.join(values)})")

    def _lanes_of(self, expr: Expr, element: str) -> str:
        """The value as a vector of an integer type or of conditions; a literal adopts the type."""
        text = self._piece(expr, is_float=False).text
        return text if self.is_lanes(expr) else f"{_VECTORS.get(element, 'ints')}({text})"

    def _unary(self, expr: Unary, is_float: bool) -> Piece:
        if expr.op == "not":
            return Piece(f"logical_not({self.text(expr.x)})")
        if expr.type.element in INTEGERS:
            if expr.op == "neg":
                return self._wrapped_around(expr, f"negate({self._piece(expr.x, is_float=False).text})")
            return self._wrapped_around(expr, f"{expr.op}({self._integer(expr.x)})")
        if expr.op == "neg":
            return Piece(f"-{self._wrapped(expr.x, _UNARY, is_float)}", _UNARY)
        inside = is_float if self.is_float(expr.x) or not self.is_float(expr) else True
        text = self._piece(expr.x, inside).text if inside else self._integer(expr.x)
        return self._rounded(expr, Piece(f"{expr.op}({text})"))

    def _binary(self, expr: Binary, is_float: bool) -> Piece:
        if expr.type.element in ("bool", "truth"):
            return self._condition(expr)
        is_integer = expr.type.element in INTEGERS
        if is_integer and not (self.is_position and expr.op in ("+", "-", "*")):
            return self._integer_operation(expr)
        if expr.type.element == "int" and expr.op in ("//", "%", "min", "max"):
            text = f"{_CALLS[expr.op]}({self._integer(expr.a)}, {self._integer(expr.b)})"
            return Piece(f"(float){text}", _UNARY) if is_float else self._as_position(expr, text)
        if expr.op == "**" and isinstance(expr.b, Number) and expr.b.value in ROOTS:
            return self._rounded(expr, Piece(f"{ROOTS[expr.b.value]}({self._piece(expr.a, is_float=True).text})"))
        if expr.op in _CALLS:
            parts = [self._piece(side, is_float=True).text for side in (expr.a, expr.b)]
            return self._rounded(expr, Piece(f"{_CALLS[expr.op]}({', '.join(parts)})"))
        is_float = is_float or self.is_float(expr)
        binds = _PRECEDENCE[expr.op]
        left, right = self._wrapped(expr.a, binds, is_float), self._wrapped(expr.b, binds + 1, is_float)
        return self._rounded(expr, Piece(f"{left} {expr.op} {right}", binds))

    # integers and conditions

    @property
    def is_position(self) -> bool:
        """Whether integers are positions, which cannot overflow."""
        return self.is_index or self.integer != "int64_t"

    def _integer(self, expr: Expr) -> str:
        """The integer as an argument of a function that exists for floats too."""
        piece = self._piece(expr, is_float=False)
        is_narrow = isinstance(expr, Number) or (isinstance(expr, Load) and expr.type.element != "i64")
        if self.is_lanes(expr) or self.is_position or not is_narrow:
            return piece.text
        return f"(int64_t){piece.text if piece.precedence >= _UNARY else f'({piece.text})'}"

    def _integer_operation(self, expr: Binary) -> Piece:
        left, right = (self._piece(side, is_float=False).text for side in (expr.a, expr.b))
        if expr.op in ("min", "max"):
            left, right = self._integer(expr.a), self._integer(expr.b)
        return self._wrapped_around(expr, f"{_INTEGER_CALLS[expr.op]}({left}, {right})")

    def _wrapped_around(self, expr: Unary | Binary, text: str) -> Piece:
        """The result in the range of its type: a lane of i32 and i64 has this range by itself."""
        element = expr.type.element
        has_range = element == "i64" or (element == "i32" and self.is_lanes(expr))
        if has_range or expr.op in ("min", "max", "relu", "%") or self.is_position:
            return self._as_position(expr, text)
        return Piece(f"wrap<{CPP_TYPES[element]}>({text})")

    def _as_position(self, expr: Expr, text: str) -> Piece:
        """The result of a function on integers, which is an int64_t, in the type of the numbers of a hook."""
        is_int64 = self.integer == "int64_t" or self.is_lanes(expr)
        return Piece(text) if is_int64 else Piece(f"({self.integer}){text}", _UNARY)

    def _condition(self, expr: Binary) -> Piece:
        """A comparison, or a conjunction or disjunction."""
        op = {"and": "&", "or": "|"}.get(expr.op, expr.op)
        sides = (expr.a, expr.b)
        binds = _PRECEDENCE[op]
        if {side.type.element for side in sides} <= {"bool", "truth"}:
            if self.is_lanes(expr.a) != self.is_lanes(expr.b):
                texts = [self._wrapped(s, 3, False) if self.is_lanes(s) else f"mask({self.text(s)})" for s in sides]
                return Piece(f" {op} ".join(texts), binds)
            return Piece(f"{self._wrapped(expr.a, binds, False)} {op} {self._wrapped(expr.b, binds + 1, False)}", binds)
        is_float = self._compares_floats(expr)
        left, right = self._wrapped(expr.a, binds, is_float), self._wrapped(expr.b, binds + 1, is_float)
        if not is_float and self.is_lanes(expr):
            left, right = (self._compared(side, text) for side, text in zip(sides, (left, right), strict=True))
            if any(side.type.element == "i64" for side in sides) and self.integer == "int64_t":
                return Piece(f"condition({left} {op} {right})")
        return Piece(f"{left} {op} {right}", binds)

    def _compared(self, side: Expr, text: str) -> str:
        """A number of the row next to a vector of i8 or i32 must have the type of its lanes."""
        is_number = self.is_lanes(side) or isinstance(side, Number) or self.integer != "int64_t"
        return text if is_number or side.type.element == "i64" else f"(int32_t){text}"

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
            return self._integer_cast(expr)
        if source in INTEGERS:
            if self.is_lanes(expr.x):
                inner = Piece(f"floats({self._piece(expr.x, is_float=False).text})")
            else:
                inner = Piece(f"(float){self._wrapped(expr.x, _UNARY, False)}", _UNARY)
        else:
            inner = self._piece(expr.x, is_float=True)
        if element in ("f32", source):
            return inner
        return Piece(f"to<{self.cpp_type(element)}>({inner.text})")

    def _integer_cast(self, expr: Cast) -> Piece:
        element, source = expr.type.element, expr.x.type.element
        inner = self._piece(expr.x, is_float=source not in INTEGERS)
        if element == source or self.is_position:
            return inner
        if self.is_lanes(expr.x):
            text = f"{_VECTORS[element]}({inner.text})"
        elif source in INTEGERS:
            text = inner.text
        else:
            text = f"(int64_t){inner.text if inner.precedence >= _UNARY else f'({inner.text})'}"
        is_widening = source in INTEGERS and INTEGERS.index(source) < INTEGERS.index(element)
        if element == "i64" or is_widening or (element == "i32" and self.is_lanes(expr.x)):
            return Piece(text)
        return Piece(f"wrap<{CPP_TYPES[element]}>({text})")

    def _if_present(self, expr: IfPresent, is_float: bool) -> Piece:
        if self.is_lanes(expr.a) == self.is_lanes(expr.b):
            a, b = (self._piece(side, is_float).text for side in (expr.a, expr.b))
        elif is_float:
            a, b = (self.lanes_text(side, is_float) for side in (expr.a, expr.b))
        else:
            a, b = (self._lanes_of(side, expr.type.element) for side in (expr.a, expr.b))
        return Piece(f"{self.optional[expr.name]} ? {a} : {b}", _CONDITIONAL)

    # locations

    def _load(self, location: Location, expr: Load) -> Piece:
        at, step = self.address(location)
        if step is None:
            text = self._element(location)
            return Piece(text if expr.type.element in (*INTEGERS, "bool") else f"widen({text})")
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
        return [
            f"{position} * {stride}" if stride else position
            for at, stride in self._strided(location)
            if (position := affine_text(at, without, bare=not stride)) != "0"
        ]

    def _strided(self, location: Location) -> list[tuple[Affine, str]]:
        """The position along each dim with the name of its stride, "" for the last one. A scalar has no dims."""
        strides = [*self.operands[location.operand], ""]
        return list(zip(location.index, strides, strict=True)) if location.index else []

    def _step(self, location: Location) -> str | None:
        parts = []
        for at, stride in self._strided(location):
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
