"""Text of a format's value in torch. Operands have their dims in one order, and are broadcast by name."""

import re
from dataclasses import dataclass, replace

from sageLLM.codegen.model.format import (
    Binary,
    Bits,
    Codes,
    Concat,
    Constant,
    FormatDef,
    Lookup,
    Named,
    PowerOfTwo,
    Repeat,
    Stored,
    StoredLookup,
    StoredTensor,
    Take,
    Value,
    parts,
    walk,
)

_STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "%": 2}
_ATOM = 3
TORCH = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "u8": "uint8", "i8": "int8", "i32": "int32"}


@dataclass(frozen=True, slots=True)
class FormatText:
    """The function of one format: its arguments, its lines and its result.

    Text that `is_narrow` computes integers in 8 bits, modulo 256.
    """

    format: FormatDef
    codes: Codes | None = None
    is_narrow: bool = False

    @property
    def sizes(self) -> list[str]:
        """The numbers that the function takes: dims, and sizes without a constant."""
        return self._sizes("\n".join([*self.lines, self.result]))

    @property
    def constants(self) -> list[tuple[str, int]]:
        """Sizes with a constant that the function uses."""
        return self._constants("\n".join([*self.lines, self.result]))

    @property
    def code_sizes(self) -> list[str]:
        """The numbers that the function of the codes takes."""
        return self._sizes("\n".join([*self.code_lines, *self.code_results]))

    @property
    def code_constants(self) -> list[tuple[str, int]]:
        """Sizes with a constant that the function of the codes uses."""
        return self._constants("\n".join([*self.code_lines, *self.code_results]))

    def _sizes(self, body: str) -> list[str]:
        used = [*self.format.weight, *(name for name, size in self.format.spec.sizes.items() if isinstance(size, str))]
        return [name for name in dict.fromkeys(used) if _occurs(name, body)]

    def _constants(self, body: str) -> list[tuple[str, int]]:
        return [(n, s) for n, s in self.format.spec.sizes.items() if isinstance(s, int) and _occurs(n, body)]

    @property
    def code_lines(self) -> list[str]:
        """Assignments before the codes: those of the value that the codes use. Floats keep their type."""
        text = "\n".join(self.code_results)
        found: list[str] = []
        for line in reversed(self.lines):
            name = line.split(" = ")[0]
            if _occurs(name, text):
                line = line.replace(".to(of)", "")
                line = line.replace(".int()", "") if self._are_the_codes(name) else line
                found = [line, *found] if line != f"{name} = {name}" else found
                text = f"{line}\n{text}"
        return found

    @property
    def code_results(self) -> list[str]:
        """The parts: codes [N, K], others [N, groups], or [E, N, ...]."""
        assert self.codes is not None, "the format has codes"
        codes = replace(self, is_narrow=True)
        return [
            codes._part(value) if name == "codes" and _is_modular(value) else self._part(value)
            for name, value in self.codes.parts.items()
        ]

    def _are_the_codes(self, name: str) -> bool:
        """Whether the codes are a stored tensor as it is."""
        assert self.codes is not None, "the format has codes"
        value = self.codes.parts["codes"]
        return isinstance(value, Stored) and value.name == name

    def uses(self, name: str) -> bool:
        """Whether the function of the codes uses a name."""
        return _occurs(name, "\n".join([*self.code_lines, *self.code_results]))

    def _part(self, value: Value) -> str:
        text, strength = self._text(value)
        text = text.replace(", of)", ", torch.float32)").replace(".to(of)", "")
        if isinstance(value, Constant) or not value.dims:
            return text
        dims = [extent.dim for extent in value.dims]
        if (inner := self.format.inner) in dims:
            at = dims.index(inner)
            size = " // ".join(["K", *map(str, value.dims[at].over)])
            text, strength, dims = f"joined({text}, {at - 1}, {size})", _ATOM, [d for d in dims if d != inner]
        wanted = [dim for dim in ("E", "N", "K") if dim in dims]
        if dims == wanted:
            return text
        text = text if strength == _ATOM else f"({text})"
        return f"{text}.T" if len(dims) == 2 else f"{text}.permute({', '.join(str(dims.index(d)) for d in wanted)})"

    @property
    def fields(self) -> list[str]:
        """The names of the fields of a block."""
        return [one.name for one in self.format.tensors] if self._is_in_blocks else []

    @property
    def layout(self) -> list[tuple[str, tuple[int, ...]]]:
        """The element type and the shape of each field of a block."""
        if not self._is_in_blocks:
            return []
        length = self.format.spec.sizes["B"]
        assert isinstance(length, int), "checked when the format is linked"
        shapes = [tuple(int(length * extent.factor) for extent in one.dims[2:]) for one in self.format.tensors]
        return [(f"torch.{TORCH[one.element]}", shape) for one, shape in zip(self.format.tensors, shapes, strict=True)]

    @property
    def _is_in_blocks(self) -> bool:
        return self.format.block_bytes is not None

    @property
    def arguments(self) -> list[str]:
        return ["blocks"] if self._is_in_blocks else [one.name for one in self.format.tensors]

    @property
    def lines(self) -> list[str]:
        """Assignments before the result: operands in the order of the computation, and the expressions of `let`.

        Fields of blocks are in that order already; they are widened where they are used.
        """
        found = []
        for one in self.format.tensors if not self._is_in_blocks else ():
            if (text := self._operand(one)) != one.name and one is not self._plain:
                found.append(f"{one.name} = {text}")
        found += [f"{name} = {self._text(value)[0]}" for name, value in self.format.let.items()]
        return found

    @property
    def result(self) -> str:
        """The value, joined from blocks and in the order of the weight's dims."""
        if self._plain is not None:
            return self._operand(self._plain)
        text, strength = self._text(self.format.value)
        dims = [extent.dim for extent in self.format.value.dims]
        inner = self.format.inner
        if inner is not None:
            text, strength, dims = f"joined({text}, {dims.index(inner) - 1}, K)", _ATOM, [d for d in dims if d != inner]
        if tuple(dims) == self.format.weight:
            return text
        text = text if strength == _ATOM else f"({text})"
        if len(dims) == 2:
            return f"{text}.T"
        return f"{text}.permute({', '.join(str(dims.index(dim)) for dim in self.format.weight)})"

    @property
    def _plain(self) -> StoredTensor | None:
        """The tensor that is the value as it is."""
        value = self.format.value
        return next((one for one in self.format.tensors if isinstance(value, Stored) and one.name == value.name), None)

    def _operand(self, one: StoredTensor) -> str:
        """A stored tensor with its dims in the order of the computation, floats and small integers widened."""
        dims = [extent.dim for extent in one.dims]
        ordered = sorted(dims, key=self.format.dims.index)
        text = one.name
        if dims != ordered:
            text += ".T" if len(dims) == 2 else f".permute({', '.join(str(dims.index(dim)) for dim in ordered)})"
        return text if self._is_only_of_bits(one.name) else text + _widened(one)

    def _is_only_of_bits(self, name: str) -> bool:
        """Whether the fields of the words are used, and not the words as numbers."""

        def uses(value: Value) -> list[Value]:
            match value:
                case Bits(x=Stored()):
                    return []
                case Stored(name=found) if found == name:
                    return [value]
            return [use for part in parts(value) for use in uses(part)]

        return not any(uses(root) for root in (*self.format.let.values(), self.format.value))

    def text_of(self, value: Value) -> str:
        """An expression in parentheses, where it has operators."""
        return self._atom(value)

    def _text(self, value: Value) -> tuple[str, int]:
        """The expression and the strength of its outermost operator."""
        match value:
            case Stored(name=name) if self._is_in_blocks:
                field = next(one for one in self.format.tensors if one.name == name)
                return name if self.is_narrow and field.element in ("i8", "u8") else name + _widened(field), _ATOM
            case Stored(name=name) | Named(name=name):
                return name, _ATOM
            case Constant(text=text):
                return text, _ATOM
            case Binary():
                return self._binary(value)
            case Bits(x=x, width=width, dim=dim, order=order, run=run):
                extra = f", order={order}" if order is not None else f", run={run}" if run > 1 else ""
                extra += ", of=torch.uint8" if self.is_narrow else ""
                words = x.name if isinstance(x, Stored) else self._text(x)[0]
                return self._cut(f"bits({words}, {width}, {self._axis(x, dim)}{extra})", value, dim), _ATOM
            case Repeat(x=x, count=count, dim=dim):
                text = f"{self._atom(x)}.repeat_interleave({count}, {self._axis(x, dim)})"
                return self._cut(text, value, dim), _ATOM
            case Lookup(x=x, table=table):
                return f"lookup({self._text(x)[0]}, {table}, of)", _ATOM
            case StoredLookup(x=x, table=values):
                return f"{self._text(values)[0]}[{self._text(x)[0]}]", _ATOM
            case PowerOfTwo(x=x):
                return f"power_of_two({self._text(x)[0]}, of)", _ATOM
            case Take(x=x, index=index, dim=dim):
                return f"{self._atom(x)}.index_select({self._axis(x, dim)}, {self._text(index)[0]})", _ATOM
            case Concat(a=a, b=b, dim=dim):
                return f"torch.cat([{self._text(a)[0]}, {self._text(b)[0]}], {self._axis(a, dim)})", _ATOM
        raise AssertionError(f"a node without text: {value}")

    def _binary(self, value: Binary) -> tuple[str, int]:
        if value.op == "**":  # of 2, see `link/format_values.py`; typed as an integer, unlike the operator
            return f"(1 << {self._text(value.b)[0]})", _ATOM
        strength = _STRENGTH[value.op]
        texts = []
        for operand, least in ((value.a, strength), (value.b, strength + 1)):
            text, own = self._text(operand)
            index = self._broadcast(operand, value)
            if own < (_ATOM if index else least):
                text = f"({text})"
            texts.append(text + index)
        return f"{texts[0]} {value.op} {texts[1]}", strength

    def _broadcast(self, operand: Value, result: Value) -> str:
        """An index that adds the dims of the result that the operand lacks; torch adds those before its first one."""
        own = {extent.dim for extent in operand.dims}
        dims = [extent.dim for extent in result.dims]
        first = next((i for i, dim in enumerate(dims) if dim in own), len(dims))
        missing = [dim not in own for dim in dims[first:]]
        if not any(missing):
            return ""
        if all(missing[missing.index(True) :]):
            return f"[..., {', '.join('None' for one in missing if one)}]"
        return f"[{', '.join('None' if one else ':' for one in missing)}]"

    def _axis(self, x: Value, dim: str) -> int:
        return [extent.dim for extent in x.dims].index(dim)

    def _atom(self, value: Value) -> str:
        text, strength = self._text(value)
        return text if strength == _ATOM else f"({text})"

    def _cut(self, text: str, value: Value, dim: str) -> str:
        """The value without the elements after the end of a dim that its words or groups do not divide."""
        axis = self._axis(value, dim)
        extent = value.dims[axis]
        if not extent.is_whole or dim not in self.format.weight:
            return text
        return f"{text}[{''.join(':, ' for _ in range(axis))}:{dim}]"


def _is_modular(value: Value) -> bool:
    """Whether the value modulo 256 is computed from its parts modulo 256."""
    return not any(isinstance(one, Named) or (isinstance(one, Binary) and one.op not in "+-*") for one in walk(value))


def _widened(one: StoredTensor) -> str:
    """The conversion of a stored tensor whose elements are used as numbers."""
    if one.element in ("i8", "u8"):
        return ".int()"
    if one.element not in ("f8", "f16", "bf16", "f32", "float"):
        return ""
    return ".to(of)" if one.dims else ".reshape(()).to(of)"


def _occurs(name: str, text: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None
