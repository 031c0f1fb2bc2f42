"""Linked ops: typed operands, semantics, and the cost derived from them."""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from sageLLM.codegen.contents import class_name
from sageLLM.codegen.diagnostics import Span
from sageLLM.codegen.expr.size import LEADING, Size
from sageLLM.codegen.expr.tree import Expr, Program
from sageLLM.codegen.expr.types import DTYPES, ValueType
from sageLLM.codegen.load import Entry
from sageLLM.codegen.schema.ops import OpSpec

Scalar = bool | int | float | str


_PYTHON: Mapping[str, tuple[type, ...]] = {
    "f32": (int, float), "i32": (int,), "dim": (int,), "bool": (bool,), "str": (str,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Operand:
    """An input or output. Optional inputs come last."""

    name: str
    type: ValueType
    optional: bool = False
    doc: str | None = None


@dataclass(frozen=True, slots=True)
class Attr:
    """A value that is fixed when the graph is built. `formula` is a default that depends on dims."""

    name: str
    type: str
    default: Scalar | None = None
    formula: Expr | None = None
    optional: bool = False
    min: float | None = None
    max: float | None = None
    choices: tuple[Scalar, ...] | None = None
    doc: str | None = None

    @property
    def is_required(self) -> bool:
        return self.default is None and self.formula is None and not self.optional

    def why_not(self, value: Scalar) -> str | None:
        """The rule that a constant breaks: `factor must be f32, got 'x'`; None if the attr may have this value."""
        is_type = isinstance(value, _PYTHON[self.type]) and isinstance(value, bool) == (self.type == "bool")
        if not is_type:
            return f"{self.name} must be {self.type}, got {value!r}"
        if self.choices and value not in self.choices:
            return f"{self.name} must be one of {', '.join(map(repr, self.choices))}, got {value!r}"
        if isinstance(value, bool | str):
            return None
        if self.type != "f32" and not -(2**31) <= value < 2**31:
            return f"{self.name} must be a 32-bit integer, got {value}"
        if self.min is not None and value < self.min:
            return f"{self.name} must be at least {self.min:g}, got {value}"
        if self.max is not None and value > self.max:
            return f"{self.name} must be at most {self.max:g}, got {value}"
        return None


@dataclass(frozen=True, slots=True)
class Condition:
    """A `where` line, which must hold for the dims and attrs of every use of the op."""

    text: str
    value: Expr


@dataclass(frozen=True, slots=True)
class AttrName:
    """An attr of the surrounding op, passed on by a call."""

    name: str


@dataclass(frozen=True, slots=True)
class AttrFormula:
    """A number computed from attrs, `3 * Q`: as text, and linked as a size (of dims) or a value."""

    text: str
    names: tuple[str, ...]
    size: Size | None = None
    value: Expr | None = None

    @property
    def node(self) -> ast.expr:
        return ast.parse(self.text, mode="eval").body

    def evaluate(self, values: Mapping[str, float]) -> float:
        """The number, for numbers of the attrs."""
        return _evaluate(self.node, values)


_OPERATIONS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _evaluate(node: ast.expr, values: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name):
            return values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, values)
        case ast.BinOp(left=left, op=operation, right=right):
            return _OPERATIONS[type(operation)](_evaluate(left, values), _evaluate(right, values))
    raise AssertionError(f"the linker refuses {ast.unparse(node)}")


AttrValue = AttrName | AttrFormula | Scalar | None
"""The value of an attr in a call: that of an attr, a formula, a constant, or absent."""


@dataclass(frozen=True, slots=True)
class Call:
    """A line of `fuses`: `targets = op(args, **kwargs)`. An absent optional argument is None."""

    targets: tuple[str, ...]
    op: str
    args: tuple[str | None, ...]
    kwargs: tuple[tuple[str, AttrValue], ...]
    text: str
    span: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class Hook:
    """An expression over a tile of scores, filled into a template."""

    name: str
    text: str
    value: Expr


@dataclass(frozen=True, slots=True)
class Reference:
    """A hand-written torch function: a template with its parameters and hooks."""

    template: str
    params: tuple[tuple[str, int | float | bool], ...]
    hooks: tuple[Hook, ...]


@dataclass(frozen=True, slots=True)
class Template:
    """A template of a kernel for one target, and its constants."""

    name: str
    params: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """The pass that rewrites the calls of `fuses` into the op; rules with a greater benefit are tried first."""

    pass_: str
    benefit: int
    span: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class Cost:
    """Work as formulas of the op's dims, of `E_size` (bytes per element), and of `let` (known at run time)."""

    flops: Size
    bytes: Size
    let: Mapping[str, str]
    read: Mapping[str, Size]  # bytes by operand; a gathered operand counts only the rows that are read
    written: Mapping[str, Size]


@dataclass(frozen=True, slots=True)
class OpDef:
    """One linked op. Exactly one of `program`, `fuses` and `reference` defines its semantics."""

    name: str
    entry: Entry[OpSpec]
    op_type: str
    elements: Mapping[str, tuple[str, ...]]  # element variable -> element types
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attrs: tuple[Attr, ...]
    where: tuple[Condition, ...]
    inplace: Mapping[str, str]
    cost: Cost
    program: Program | None = None
    fuses: tuple[Call, ...] = ()
    reference: Reference | None = None
    triton: Template | None = None
    rule: Rule | None = None

    @property
    def summary(self) -> str:
        return self.entry.spec.summary

    @property
    def doc(self) -> str | None:
        return self.entry.spec.doc

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(self.entry.spec.tags)

    @property
    def is_view(self) -> bool:
        """Whether its results alias its first input, as slices or reshapes."""
        return self.op_type == "VIEW" or "view" in self.tags

    @property
    def epilogue_of(self) -> str | None:
        """The input that the op's kernel can read block by block, as the epilogue of the GEMM that produces it."""
        kernel = self.entry.spec.kernel
        return kernel.epilogue_of if kernel else None

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(self.entry.spec.phases)

    @property
    def cases(self) -> list[dict[str, int | list[int]]]:
        """Sizes to test with, by dim; `R` holds the leading dims."""
        return self.entry.spec.tests.cases if self.entry.spec.tests else []

    @property
    def ref(self) -> str:
        return self.entry.ref

    @property
    def stem(self) -> str:
        """The stem of the spec file and of the generated files."""
        return PurePosixPath(self.entry.doc.file).stem

    @property
    def class_name(self) -> str:
        return class_name(self.name)

    @property
    def equation(self) -> str:
        """The semantics as text: equations, calls of other ops, or the name of the reference."""
        spec = self.entry.spec
        if spec.compute is not None:
            return spec.compute.strip()
        return "\n".join(spec.fuses) if spec.fuses else f"see kernels/reference: {spec.reference}"

    @property
    def symbols(self) -> tuple[str, ...]:
        """The dims of operands and dim attrs, in order of first use."""
        sizes = [dim for operand in (*self.inputs, *self.outputs) for dim in operand.type.dims if dim != LEADING]
        names = [symbol for size in sizes for symbol in (written_order(size) or size.symbols)]
        return tuple(dict.fromkeys([*names, *(attr.name for attr in self.attrs if attr.type == "dim")]))

    @property
    def element_inputs(self) -> Mapping[str, str]:
        """An input of each element variable."""
        found: dict[str, str] = {}
        for operand in self.inputs:
            if operand.type.element not in DTYPES and not operand.optional:
                found.setdefault(operand.type.element, operand.name)
        return found

    def operand(self, name: str) -> Operand | None:
        return next((o for o in (*self.inputs, *self.outputs) if o.name == name), None)

    def attr(self, name: str) -> Attr | None:
        return next((attr for attr in self.attrs if attr.name == name), None)


def written_order(size: Size) -> list[str]:
    """The symbols of a size, in the order of the spec's text."""
    text = size.text or ""
    words = "".join(c if c.isalnum() else " " for c in text).split()
    return [word for word in dict.fromkeys(words) if word in size.symbols]
