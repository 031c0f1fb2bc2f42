"""Links the signature of an op: its dims and element types, operands and attrs."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from sageLLM.codegen.contents import class_name
from sageLLM.codegen.diagnostics import Sink, Span, did_you_mean
from sageLLM.codegen.expr.check import Checker
from sageLLM.codegen.expr.scope import Scope
from sageLLM.codegen.expr.syntax import Refused, Text, parse_expression
from sageLLM.codegen.expr.tree import Expr
from sageLLM.codegen.expr.types import DIM_NAME, LARGEST, ValueType, parse_type
from sageLLM.codegen.expr.value_names import RESERVED_FOR_OPERANDS, why_not_a_value_name
from sageLLM.codegen.load import Entry, RawSpecs
from sageLLM.codegen.model.op import Attr, Operand
from sageLLM.codegen.names import why_not_a_function
from sageLLM.codegen.schema.ops import AttrSpec, InputSpec, OpSpec

DEFAULT_ELEMENTS = {"E": ("f16", "bf16", "f32", "f64")}
_LITERALS = {"f32": "float", "i32": "int", "bool": "truth", "str": "str", "dim": "int"}
_PYTHON: dict[str, tuple[type, ...]] = {
    "f32": (int, float),
    "i32": (int,),
    "bool": (bool,),
    "str": (str,),
    "dim": (int,),
}


@dataclass(frozen=True, slots=True)
class Signature:
    """The operands and attrs of an op, and the dims and element variables that they may use."""

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attrs: tuple[Attr, ...]
    dims: Mapping[str, object]
    elements: Mapping[str, tuple[str, ...]]

    @property
    def input_types(self) -> dict[str, ValueType]:
        return {o.name: o.type for o in self.inputs}

    @property
    def output_types(self) -> dict[str, ValueType]:
        return {o.name: o.type for o in self.outputs}

    @property
    def optional(self) -> frozenset[str]:
        return frozenset(o.name for o in self.inputs if o.optional)

    @property
    def dim_attrs(self) -> set[str]:
        return {attr.name for attr in self.attrs if attr.type == "dim"}

    def scope(self) -> Scope:
        """The names that expressions of the op may use: inputs, attrs, and the dims of operands."""
        types = [*self.input_types.values(), *self.output_types.values()]
        symbols = [symbol for type_ in types for dim in type_.dims for symbol in dim.symbols if symbol != "R"]
        return Scope(
            self.input_types,
            {attr.name: ValueType(_LITERALS[attr.type]) for attr in self.attrs if attr.type != "dim"},
            dict.fromkeys([*symbols, *sorted(self.dim_attrs)]),
            self.elements,
            self.optional | {attr.name for attr in self.attrs if attr.optional},
            unbound=frozenset(self.elements.keys() - {o.type.element for o in self.inputs if not o.optional}),
        )


@dataclass(slots=True)
class SignatureLinker:
    """Links the declarations of one entry, collecting the findings of all its fields."""

    entry: Entry[OpSpec]
    raw: RawSpecs
    sink: Sink
    dims: dict[str, object] = field(default_factory=dict)
    elements: dict[str, tuple[str, ...]] = field(default_factory=dict)
    names: Scope = field(default_factory=Scope)

    def link(self) -> Signature | None:
        """The signature, or None after a finding."""
        before = len(self.sink.diagnostics)
        self._declare_dims()
        spec = self.entry.spec
        inputs = self._operands("inputs", spec.inputs)
        outputs = self._operands("outputs", {name: InputSpec(type=text) for name, text in spec.outputs.items()})
        signature = Signature(inputs, outputs, self._attrs(), self.dims, self.elements)
        return signature if len(self.sink.diagnostics) == before else None

    def _declare_dims(self) -> None:
        spec, entry = self.entry.spec, self.entry
        if why := _why_not_an_op_name(entry.name):
            self.sink.error("SAGE116", f"expected an op name, got '{entry.name}'", entry.key_span(), why)
        dim_attrs = [name for name, attr in spec.attrs.items() if attr.type == "dim"]
        self.dims = dict.fromkeys([*self.raw.dims, *spec.dims, *dim_attrs])
        self.elements = DEFAULT_ELEMENTS | {name: tuple(types) for name, types in spec.types.items()}
        for name in (*spec.dims, *spec.types, *dim_attrs):
            if not DIM_NAME.match(name):
                message = f"'{name}' must begin with a capital letter and contain only letters and digits"
                self.sink.error("SAGE116", message, self._declared_at(name), f"rename it, e.g. '{name[:1].upper()}'")
        for name in self.elements.keys() & self.dims.keys():
            message = f"'{name}' must not be both a dim and an element type"
            self.sink.error("SAGE116", message, self._declared_at(name), "rename one of them")
        if class_name(entry.name) in self.dims:
            message = f"the class name of '{entry.name}' must not be the name of a dim"
            self.sink.error("SAGE116", message, entry.key_span(), "rename the op")
        if spec.op_type is not None and spec.op_type not in self.raw.op_types:
            help = did_you_mean(spec.op_type, self.raw.op_types)
            self.sink.error("SAGE121", f"unknown op_type '{spec.op_type}'", entry.span("op_type"), help)
        self.names = Scope(dims=self.dims, elements=self.elements)

    def _declared_at(self, name: str) -> Span:
        for key in ("types", "dims", "attrs"):
            if name in getattr(self.entry.spec, key):
                return self.entry.key_span(key, name)
        return self.entry.key_span()

    def declare(self, name: str, type_: ValueType, *path: str) -> None:
        """Registers the name of an operand, attr or view; reports a name that cannot be used."""
        why = why_not_a_value_name(name, self.names, RESERVED_FOR_OPERANDS)
        if why:
            self.sink.error("SAGE116", why, self.entry.key_span(*path), "choose another name")
        self.names.values[name] = type_

    def _operands(self, key: str, specs: Mapping[str, str | InputSpec]) -> tuple[Operand, ...]:
        found: list[Operand] = []
        for name, declared in specs.items():
            spec = declared if isinstance(declared, InputSpec) else InputSpec(type=declared)
            is_long = isinstance(declared, InputSpec) and key == "inputs"
            path = (key, name, "type") if is_long else (key, name)
            with suppress(Refused):
                type_ = parse_type(self._text(spec.type, *path), self.elements, self.dims)
                self.declare(name, type_, key, name)
                if found and found[-1].optional and not spec.optional:
                    span = self.entry.key_span(key, name)
                    message = f"the required input '{name}' must come before the optional ones"
                    self.sink.error("SAGE130", message, span, "move the optional inputs to the end")
                found.append(Operand(name, type_, spec.optional, spec.doc))
        return tuple(found)

    def _attrs(self) -> tuple[Attr, ...]:
        found: list[Attr] = []
        for name, spec in self.entry.spec.attrs.items():
            if spec.type != "dim":
                self.declare(name, ValueType(_LITERALS[spec.type]), "attrs", name)
            with suppress(Refused):
                found.append(self._attr(name, spec))
        return tuple(found)

    def _attr(self, name: str, spec: AttrSpec) -> Attr:
        formula = None
        default = spec.default
        if isinstance(default, str) and spec.type in ("f32", "i32"):
            formula, default = self._formula(self._text(default, "attrs", name, "default")), None
        self._check_range(name, spec)
        if default is not None:
            self._check_default(name, spec, default)
        if spec.optional and (default is not None or formula is not None):
            raise self._refuse_default(name, "an optional attr must not have a default")
        choices = tuple(spec.choices) if spec.choices else None
        value = float(default) if spec.type == "f32" and isinstance(default, int) else default
        return Attr(name, spec.type, value, formula, spec.optional, spec.min, spec.max, choices, spec.doc)

    def _check_range(self, name: str, spec: AttrSpec) -> None:
        """Reports bounds that exclude each other or do not fit the type, and choices of another type."""
        bounds = {key: value for key in ("min", "max") if (value := getattr(spec, key)) is not None}
        for key, value in bounds.items():
            if spec.type not in ("f32", "i32", "dim"):
                raise self._refuse_field(name, key, f"`{key}` requires a number, '{name}' is {spec.type}", "remove it")
            if spec.type != "f32" and not _fits_i32(value):
                message = f"`{key}` of '{name}' must be a 32-bit integer, got {value:g}"
                raise self._refuse_field(name, key, message, "use -2**31 to 2**31 - 1")
        if len(bounds) == 2 and bounds["min"] > bounds["max"]:
            message = f"`min` must be at most `max`, got {bounds['min']:g} and {bounds['max']:g}"
            raise self._refuse_field(name, "min", message, "swap them")
        for i, choice in enumerate(spec.choices or ()):
            is_type = isinstance(choice, _PYTHON[spec.type]) and isinstance(choice, bool) == (spec.type == "bool")
            if not is_type:
                message = f"a choice of '{name}' must be of type {spec.type}, got {choice!r}"
                raise self._refuse_field(name, "choices", message, "change the choice or `type`", i)

    def _refuse_field(self, name: str, key: str, message: str, help: str, *path: int) -> Refused:
        self.sink.error("SAGE125", message, self.entry.span("attrs", name, key, *path), help)
        return Refused(message)

    def _check_default(self, name: str, spec: AttrSpec, value: object) -> None:
        wrong_bool = isinstance(value, bool) and spec.type != "bool"
        if not isinstance(value, _PYTHON[spec.type]) or wrong_bool:
            raise self._refuse_default(name, f"the default of '{name}' must be of type {spec.type}")
        if spec.type in ("i32", "dim") and not _fits_i32(value):
            raise self._refuse_default(name, f"the default of '{name}' must be a 32-bit integer, got {value}")
        if spec.type == "f32" and isinstance(value, int | float) and abs(value) > LARGEST["f32"]:
            raise self._refuse_default(name, f"the default of '{name}' does not fit f32, got {value:g}")
        low, high = spec.min, spec.max
        if isinstance(value, int | float) and (
            (low is not None and value < low) or (high is not None and value > high)
        ):
            raise self._refuse_default(name, f"the default of '{name}' must be within `min` and `max`")
        if spec.choices and value not in spec.choices:
            raise self._refuse_default(name, f"the default of '{name}' must be one of its choices")

    def _refuse_default(self, name: str, message: str) -> Refused:
        self.sink.error("SAGE125", message, self.entry.span("attrs", name, "default"), "change the default")
        return Refused(message)

    def _formula(self, text: Text) -> Expr:
        value = Checker(text, Scope(dims=self.dims, elements={})).expression(parse_expression(text))
        if value.type.element not in ("int", "float"):
            help = "write for example `D ** -0.5`"
            raise text.refuse("SAGE125", "a default must be a number or an expression of dims", None, help)
        return value

    def _text(self, value: str, *path: str | int) -> Text:
        return Text.of(value, self.entry, path, self.sink)


def _fits_i32(value: object) -> bool:
    return isinstance(value, int) and -(2**31) <= value < 2**31


def _why_not_an_op_name(name: str) -> str | None:
    if 1 < len(name) <= 40:
        return why_not_a_function(name)
    return "it must have 2 to 40 characters"
