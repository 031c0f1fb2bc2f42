"""Binding of a called op's element variables and dims to the types of its caller."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sageLLM.codegen.expr.cost import element_bytes
from sageLLM.codegen.expr.size import LEADING, Size, volume
from sageLLM.codegen.expr.types import DTYPES, ValueType
from sageLLM.codegen.model.op import AttrFormula, AttrName, AttrValue, Call, OpDef, Operand


class TypeMismatch(Exception):
    """The type of an argument does not match the operand."""


@dataclass(slots=True)
class Binding:
    """Element variables and dims of a called op, bound to types and sizes of the caller."""

    elements: dict[str, str] = field(default_factory=dict)
    dims: dict[str, Size] = field(default_factory=dict)
    leading: tuple[Size, ...] | None = None

    def fix(self, op: OpDef, kwargs: Iterable[tuple[str, AttrValue]]) -> None:
        """Binds the dims that are attrs of the called op, since operands need not determine them."""
        for name, value in kwargs:
            attr = op.attr(name)
            if attr is None or attr.type != "dim":
                continue
            match value:
                case AttrName(name=other):
                    self.dims[name] = Size.symbol(other)
                case AttrFormula(size=Size() as size):
                    self.dims[name] = size
                case int():
                    self.dims[name] = Size.of(value)

    def match(self, declared: ValueType, actual: ValueType) -> None:
        """Binds new dims and elements and compares known ones; raises TypeMismatch."""
        self._match_element(declared.element, actual.element)
        dims, sizes = list(declared.dims), list(actual.dims)
        if dims and dims[0] == LEADING:
            count = len(sizes) - len(dims) + 1
            if count < 0:
                raise TypeMismatch
            self._match_leading(tuple(sizes[:count]))
            dims, sizes = dims[1:], sizes[count:]
        if len(dims) != len(sizes):
            raise TypeMismatch
        for dim, size in zip(dims, sizes, strict=True):
            self._match_dim(dim, size)

    def _match_element(self, declared: str, actual: str) -> None:
        known = declared if declared in DTYPES else self.elements.setdefault(declared, actual)
        if known != actual:
            raise TypeMismatch

    def _match_leading(self, dims: tuple[Size, ...]) -> None:
        if self.leading is not None and self.leading != dims:
            raise TypeMismatch
        self.leading = dims

    def _match_dim(self, dim: Size, size: Size) -> None:
        known = dim.substitute(self.dims)
        unknown = [symbol for symbol in dim.symbols if symbol not in self.dims]
        if len(unknown) == 1:
            solved = known.solve(unknown[0], size)
            if solved is None:
                raise TypeMismatch
            self.dims[unknown[0]] = solved
        elif unknown or known != size:
            raise TypeMismatch

    def apply(self, type_: ValueType) -> ValueType:
        """The called op's type in the caller's terms."""
        dims: list[Size] = []
        for dim in type_.dims:
            dims += (self.leading or ()) if dim == LEADING else (dim.substitute(self.dims),)
        return ValueType(self.elements.get(type_.element, type_.element), tuple(dims))

    def formula(self, size: Size) -> Size:
        """A cost formula of the called op in the caller's terms."""
        env = dict(self.dims)
        if self.leading is not None:
            env["R"] = volume(self.leading)
        for name, element in self.elements.items():
            env[f"{name}_size"] = element_bytes(element)
        return size.substitute(env)


class BoundCall(NamedTuple):
    """A line of `fuses`, the op that it calls, and its arguments by operand, without absent ones."""

    call: Call
    op: OpDef
    binding: Binding
    arguments: tuple[tuple[Operand, str], ...]


def bound_calls(calls: Iterable[Call], inputs: Sequence[Operand], ops: Mapping[str, OpDef]) -> Iterator[BoundCall]:
    """The calls of an op with these inputs, each bound to the types of its arguments and to the absence of others."""
    types = {o.name: o.type for o in inputs}
    optional = {o.name for o in inputs if o.optional}
    for call in calls:
        op, binding = ops[call.op], Binding()
        binding.fix(op, call.kwargs)
        pairs = tuple((o, arg) for o, arg in zip(op.inputs, call.args, strict=False) if arg is not None)
        for operand, arg in pairs:
            binding.match(operand.type, types[arg])
        args = {operand.name: arg for operand, arg in pairs}
        for operand in (o for o in op.inputs if o.optional):
            passed = args.get(operand.name)
            is_present = Size.symbol(f"has_{passed}") if passed in optional else Size.of(int(passed is not None))
            binding.dims[f"has_{operand.name}"] = is_present
        types |= {target: binding.apply(o.type) for o, target in zip(op.outputs, call.targets, strict=True)}
        yield BoundCall(call, op, binding, pairs)
