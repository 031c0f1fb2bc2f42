"""Links op entries: typed operands, expressions and calls, and derived costs."""

import ast
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from sageLLM.codegen.contents import class_name
from sageLLM.codegen.diagnostics import Sink, Span, did_you_mean
from sageLLM.codegen.expr.check import Checker, Scope
from sageLLM.codegen.expr.cost import element_bytes, program_flops, program_reads, program_writes, tensor_bytes
from sageLLM.codegen.expr.program import (
    RESERVED_FOR_OPERANDS,
    ProgramChecker,
    parse_view,
    why_not_a_value_name,
    with_view_types,
)
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.syntax import Refused, Text, parse_expression
from sageLLM.codegen.expr.tree import Binary, DimRef, Expr, Program, View
from sageLLM.codegen.expr.types import DIM_NAME, DTYPES, ValueType, parse_type, size_of
from sageLLM.codegen.link.calls import fused_cost, link_calls
from sageLLM.codegen.link.hooks import link_reference
from sageLLM.codegen.link.templates import link_triton
from sageLLM.codegen.load import Entry, RawSpecs, fused_names
from sageLLM.codegen.model.op import Attr, Call, Condition, Cost, OpDef, Operand, Reference, Rule
from sageLLM.codegen.schema.ops import AttrSpec, InputSpec, KernelSpec, OpSpec

DEFAULT_ELEMENTS = {"E": ("f16", "bf16", "f32", "f64")}
_LITERALS = {"f32": "float", "i32": "int", "bool": "truth", "str": "str", "dim": "int"}
_PYTHON: dict[str, tuple[type, ...]] = {
    "f32": (int, float),
    "i32": (int,),
    "bool": (bool,),
    "str": (str,),
    "dim": (int,),
}


LinkOp = Callable[[Entry[OpSpec], RawSpecs, Mapping[str, OpDef], Sink], OpDef | None]


def link_op(entry: Entry[OpSpec], raw: RawSpecs, linked: Mapping[str, OpDef], sink: Sink) -> OpDef | None:
    """One op, or None after findings. Reads the vocabulary, its entry, and of `linked` the ops that it fuses."""
    return OpLinker(entry, raw, linked, sink).link()


def link_ops(raw: RawSpecs, sink: Sink, link: LinkOp = link_op) -> dict[str, OpDef]:
    """All ops by name, in spec order. Findings go to the sink; an op with findings is left out."""
    linked: dict[str, OpDef] = {}
    waiting = dict(raw.ops)
    while waiting:
        ready = [name for name, entry in waiting.items() if not fused_names(entry) & waiting.keys()]
        if not ready:
            _report_cycle(waiting, sink)
            break
        for name in ready:
            entry = waiting.pop(name)
            if (fused_names(entry) & raw.ops.keys()) - linked.keys():
                continue  # a called op has findings
            op = link(entry, raw, linked, sink)
            if op is not None:
                linked[name] = op
    return {name: linked[name] for name in raw.ops if name in linked}


def _report_cycle(waiting: Mapping[str, Entry[OpSpec]], sink: Sink) -> None:
    names = " and ".join(waiting)
    for entry in waiting.values():
        sink.error("SAGE119", f"the fused ops {names} must not call each other in a cycle", entry.key_span("fuses"))


@dataclass(frozen=True, slots=True)
class Signature:
    """The operands and attrs of an op."""

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attrs: tuple[Attr, ...]

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


@dataclass(slots=True)
class OpLinker:
    """Links one entry, collecting the findings of all its fields."""

    entry: Entry[OpSpec]
    raw: RawSpecs
    linked: Mapping[str, OpDef]
    sink: Sink
    dims: dict[str, object] = field(default_factory=dict)
    elements: dict[str, tuple[str, ...]] = field(default_factory=dict)
    taken: Scope = field(default_factory=Scope)

    def link(self) -> OpDef | None:
        before = len(self.sink.diagnostics)
        self._declare()
        spec = self.entry.spec
        inputs = self._operands("inputs", spec.inputs)
        outputs = self._operands("outputs", {name: InputSpec(type=text) for name, text in spec.outputs.items()})
        attrs = self._attrs()
        if len(self.sink.diagnostics) > before:
            return None
        op = self._semantics(Signature(inputs, outputs, attrs))
        return op if len(self.sink.diagnostics) == before else None

    def text(self, value: str, *path: str | int) -> Text:
        return Text.of(value, self.entry, path, self.sink)

    @contextmanager
    def refusable(self) -> Iterator[None]:
        """Continues with the next field after a refused one, which is already reported."""
        try:
            yield
        except Refused:
            return

    # declarations

    def _declare(self) -> None:
        spec, entry = self.entry.spec, self.entry
        if not _is_op_name(entry.name):
            message = f"expected an op name, got '{entry.name}'"
            self.sink.error("SAGE116", message, entry.key_span(), "use lower-case letters, digits and `_`")
        self.dims = dict.fromkeys([*self.raw.dims, *spec.dims, *(n for n, a in spec.attrs.items() if a.type == "dim")])
        self.elements = DEFAULT_ELEMENTS | {name: tuple(types) for name, types in spec.types.items()}
        for name in (*spec.dims, *spec.types, *(n for n, a in spec.attrs.items() if a.type == "dim")):
            if not DIM_NAME.match(name):
                message = f"'{name}' must begin with a capital letter and contain only letters and digits"
                self.sink.error("SAGE116", message, self._declared_at(name))
        for name in self.elements.keys() & self.dims.keys():
            message = f"'{name}' must not be both a dim and an element type"
            self.sink.error("SAGE116", message, self._declared_at(name))
        if class_name(entry.name) in self.dims:
            message = f"the class name of '{entry.name}' must not be the name of a dim"
            self.sink.error("SAGE116", message, entry.key_span(), "rename the op")
        if spec.op_type is not None and spec.op_type not in self.raw.op_types:
            help = did_you_mean(spec.op_type, self.raw.op_types)
            self.sink.error("SAGE121", f"unknown op_type '{spec.op_type}'", entry.span("op_type"), help)
        self.taken = Scope(dims=self.dims, elements=self.elements)

    def _declared_at(self, name: str) -> Span:
        for key in ("types", "dims", "attrs"):
            if name in getattr(self.entry.spec, key):
                return self.entry.key_span(key, name)
        return self.entry.key_span()

    def _take(self, name: str, type_: ValueType, *path: str) -> None:
        """Registers the name of an operand or attr; reports a name that cannot be used."""
        why = why_not_a_value_name(name, self.taken, RESERVED_FOR_OPERANDS)
        if why is None and not _is_value_name(name):
            why = f"'{name}' must consist of lower-case letters, digits and `_`"
        if why:
            self.sink.error("SAGE116", why, self.entry.key_span(*path), "choose another name")
        self.taken.values[name] = type_

    def _operands(self, key: str, specs: Mapping[str, str | InputSpec]) -> tuple[Operand, ...]:
        found: list[Operand] = []
        for name, declared in specs.items():
            spec = declared if isinstance(declared, InputSpec) else InputSpec(type=declared)
            is_long = isinstance(declared, InputSpec) and key == "inputs"
            path = (key, name, "type") if is_long else (key, name)
            with self.refusable():
                type_ = parse_type(self.text(spec.type, *path), self.elements, self.dims)
                self._take(name, type_, key, name)
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
                self._take(name, ValueType(_LITERALS[spec.type]), "attrs", name)
            with self.refusable():
                found.append(self._attr(name, spec))
        return tuple(found)

    def _attr(self, name: str, spec: AttrSpec) -> Attr:
        formula = None
        default = spec.default
        if isinstance(default, str) and spec.type in ("f32", "i32"):
            formula, default = self._formula(self.text(default, "attrs", name, "default")), None
        if default is not None:
            self._check_default(name, spec, default)
        if spec.optional and (default is not None or formula is not None):
            raise self._refuse_attr(name, "an optional attr must not have a default", "default")
        choices = tuple(spec.choices) if spec.choices else None
        value = float(default) if spec.type == "f32" and isinstance(default, int) else default
        return Attr(name, spec.type, value, formula, spec.optional, spec.min, spec.max, choices, spec.doc)

    def _check_default(self, name: str, spec: AttrSpec, value: object) -> None:
        wrong_bool = isinstance(value, bool) and spec.type != "bool"
        if not isinstance(value, _PYTHON[spec.type]) or wrong_bool:
            raise self._refuse_attr(name, f"the default of '{name}' must be of type {spec.type}", "default")
        low, high = spec.min, spec.max
        if isinstance(value, int | float) and (
            (low is not None and value < low) or (high is not None and value > high)
        ):
            raise self._refuse_attr(name, f"the default of '{name}' must be within `min` and `max`", "default")
        if spec.choices and value not in spec.choices:
            raise self._refuse_attr(name, f"the default of '{name}' must be one of its choices", "default")

    def _refuse_attr(self, name: str, message: str, key: str) -> Refused:
        self.sink.error("SAGE125", message, self.entry.span("attrs", name, key))
        return Refused(message)

    def _formula(self, text: Text) -> Expr:
        value = Checker(text, Scope(dims=self.dims, elements={})).expression(parse_expression(text))
        if value.type.element not in ("int", "float"):
            raise text.refuse("SAGE125", "a default must be a number or an expression of dims")
        return value

    # semantics

    def _semantics(self, signature: Signature) -> OpDef | None:
        spec, entry = self.entry.spec, self.entry
        sources = [key for key in ("compute", "fuses", "reference") if getattr(spec, key) is not None]
        if len(sources) != 1:
            found = " and ".join(f"`{key}`" for key in sources) or "none"
            message = f"'{entry.name}' must have one of `compute`, `fuses` and `reference`, got {found}"
            remedy = "keep one of them" if sources else "add one of them"
            self.sink.error("SAGE118", message, entry.key_span(), remedy)
            return None
        self._check_determined(signature)
        self._check_inplace(signature)
        self._check_fields(sources[0])
        self._check_ranks(signature)
        self._check_cases(signature)
        kinds: dict[str, Callable[[Signature], OpDef | None]] = {
            "compute": self._computed,
            "fuses": self._fused,
            "reference": self._referenced,
        }
        return kinds[sources[0]](signature)

    def _check_fields(self, source: str) -> None:
        spec = self.entry.spec
        is_filled = _is_filled(spec.kernel)
        remove, derived = "remove it", f"it is derived from `{source}`; remove it"
        wrong = [
            (bool(spec.views) and source != "compute", "views", "`views` requires `compute`", remove),
            (
                is_filled and source != "reference",
                "kernel",
                "`kernel.params`, `hooks` and `epilogue_of` require `reference`",
                remove,
            ),
            (spec.kernel is not None and source == "fuses", "kernel", "`kernel` must not be set here", derived),
            (spec.rule is not None and source != "fuses", "rule", "`rule` requires `fuses`", remove),
            (
                spec.op_type is None and source != "fuses",
                "summary",
                f"an op with `{source}` must have `op_type`",
                "add it",
            ),
            (spec.cost is not None and source != "reference", "cost", "`cost` must not be set here", derived),
            (
                spec.cost is None and source == "reference",
                "reference",
                "an op with `reference` must have `cost`",
                "add it",
            ),
            (spec.ranks is not None and source != "reference", "ranks", "`ranks` must not be set here", derived),
        ]
        for is_wrong, key, message, remedy in wrong:
            if is_wrong:
                self.sink.error("SAGE128", message, self.entry.key_span(key), remedy)

    def _check_ranks(self, signature: Signature) -> None:
        """Reports names under `ranks` that are not dims or inputs of the op."""
        spec = self.entry.spec.ranks
        if spec is None:
            return
        dims = {symbol for type_ in signature.input_types.values() for dim in type_.dims for symbol in dim.symbols}
        groups = [(("linear_in", i), names, set(signature.input_types)) for i, names in enumerate(spec.linear_in)]
        for path, names, known in [(("divides",), spec.divides, dims), (("sums",), spec.sums, dims), *groups]:
            for j, name in enumerate(names):
                if name not in known:
                    expected = "an input" if path[0] == "linear_in" else "a dim of the inputs"
                    span = self.entry.span("ranks", *path, j)
                    self.sink.error("SAGE133", f"expected {expected}, got '{name}'", span, did_you_mean(name, known))

    def _check_cases(self, signature: Signature) -> None:
        spec, required = self.entry.spec, _dims_of(signature)
        for index, case in enumerate(spec.tests.cases if spec.tests else []):
            if missing := [name for name in required if name not in case]:
                message = f"the case must have a size for {', '.join(missing)}"
                help = f"a case has sizes for {', '.join(required)}"
                self.sink.error("SAGE126", message, self.entry.span("tests", "cases", index), help)
            for name, value in case.items():
                if name not in self.dims or (isinstance(value, list) and name != "R"):
                    is_known = name in self.dims
                    message = f"{name} must be one number" if is_known else f"expected a dim of the op, got '{name}'"
                    self.sink.error("SAGE126", message, self.entry.key_span("tests", "cases", index, name))
                elif not 1 <= min(value if isinstance(value, list) else [value], default=1) <= 2**20:
                    message = f"a size must be 1 to 2**20, got {value}"
                    self.sink.error("SAGE126", message, self.entry.span("tests", "cases", index, name))

    def _check_determined(self, signature: Signature) -> None:
        """Reports dims and element variables of outputs that inputs and attrs do not determine."""
        required = [o.type for o in signature.inputs if not o.optional]
        known = {symbol for type_ in required for dim in type_.dims for symbol in dim.symbols} | signature.dim_attrs
        elements = {type_.element for type_ in required}
        for output in signature.outputs:
            missing = [symbol for dim in output.type.dims for symbol in dim.symbols if symbol not in known]
            if output.type.element in self.elements and output.type.element not in elements:
                missing.append(output.type.element)
            for name in dict.fromkeys(missing):
                message = f"{name} of the output '{output.name}' must be determined by an input"
                help = f"or make it an attr: `{name}: {{type: dim}}`" if name in self.dims else None
                self.sink.error("SAGE132", message, self.entry.span("outputs", output.name), help)

    def _check_inplace(self, signature: Signature) -> None:
        for name, source in self.entry.spec.inplace.items():
            output, input_ = signature.output_types.get(name), signature.input_types.get(source)
            if output is None:
                help = did_you_mean(name, signature.output_types)
                span = self.entry.key_span("inplace", name)
                self.sink.error("SAGE122", f"unknown output '{name}'", span, help)
            elif input_ is None:
                help = did_you_mean(source, signature.input_types)
                span = self.entry.span("inplace", name)
                self.sink.error("SAGE122", f"unknown input '{source}'", span, help)
            elif output != input_:
                message = f"an in-place output must have the type of its input, got '{name}': {output}"
                message += f" and '{source}': {input_}"
                self.sink.error("SAGE122", message, self.entry.span("inplace", name))

    def _scope(self, signature: Signature) -> Scope:
        types = [*signature.input_types.values(), *signature.output_types.values()]
        symbols = [symbol for type_ in types for dim in type_.dims for symbol in dim.symbols if symbol != "R"]
        return Scope(
            signature.input_types,
            {attr.name: ValueType(_LITERALS[attr.type]) for attr in signature.attrs if attr.type != "dim"},
            dict.fromkeys([*symbols, *sorted(signature.dim_attrs)]),
            self.elements,
            signature.optional | {attr.name for attr in signature.attrs if attr.optional},
        )

    def _computed(self, signature: Signature) -> OpDef | None:
        spec, scope = self.entry.spec, self._scope(signature)
        inputs, outputs = signature.input_types, signature.output_types
        views: list[View] = []
        known = [size for condition in self._conditions(signature) if (size := never_negative(condition.value))]
        for name, text in spec.views.items():
            with self.refusable():
                views.append(parse_view(self.text(text, "views", name), name, inputs | outputs, scope.dims, known))
                self._take(name, views[-1].type, "views", name)
        if len(views) < len(spec.views) or spec.compute is None:
            return None
        scope = with_view_types(scope, inputs, views)
        program = ProgramChecker(self.text(spec.compute, "compute"), scope, inputs, outputs, views).check()
        if program is None:
            return None
        reads, writes = program_reads(program, inputs, signature.optional), program_writes(program, outputs)
        cost = Cost(program_flops(program), _sum([*reads.values(), *writes.values()]), {}, reads, writes)
        return self._op(signature, spec.op_type or "", cost, program=program)

    def _fused(self, signature: Signature) -> OpDef | None:
        inputs, outputs = signature.inputs, signature.outputs
        calls = link_calls(self.entry, inputs, outputs, signature.attrs, self.linked, self.sink)
        if calls is None:
            return None
        spec = self.entry.spec
        op_type = spec.op_type or self.linked[calls[-1].op].op_type
        rule = Rule(spec.rule.pass_, spec.rule.benefit, self.entry.span("rule", "pass")) if spec.rule else None
        return self._op(signature, op_type, fused_cost(calls, inputs, outputs, self.linked), fuses=calls, rule=rule)

    def _referenced(self, signature: Signature) -> OpDef | None:
        reference = link_reference(self.entry, self._scope(signature), self.sink)
        cost = self._declared_cost(signature)
        self._check_epilogue_of(signature)
        if reference is None or cost is None:
            return None
        return self._op(signature, self.entry.spec.op_type or "", cost, reference=reference)

    def _check_epilogue_of(self, signature: Signature) -> None:
        """Reports a `kernel.epilogue_of` that is not a required input."""
        name = self.entry.spec.kernel.epilogue_of if self.entry.spec.kernel else None
        known = [o.name for o in signature.inputs if not o.optional]
        if name is not None and name not in known:
            message = f"expected a required input, got {'the optional ' if name in signature.optional else ''}'{name}'"
            self.sink.error("SAGE134", message, self.entry.span("kernel", "epilogue_of"), did_you_mean(name, known))

    def _declared_cost(self, signature: Signature) -> Cost | None:
        spec = self.entry.spec.cost
        if spec is None:
            return None
        names = dict(self._scope(signature).dims) | dict.fromkeys(spec.let)
        with self.refusable():
            flops = self._work(self.text(spec.flops, "cost", "flops"), names)
            moved = self._work(self.text(spec.bytes, "cost", "bytes"), names)
            reads = {name: tensor_bytes(type_) for name, type_ in signature.input_types.items()}
            writes = {name: tensor_bytes(type_) for name, type_ in signature.output_types.items()}
            return Cost(flops, moved, dict(spec.let), reads, writes)
        return None

    def _work(self, text: Text, names: Mapping[str, object]) -> Size:
        node = parse_expression(text)
        sizes = {f"{element}_size": None for element in self.elements}
        return size_of(_with_sizeof(node, self.elements), text, {**names, **sizes}, leading=True)

    def _op(
        self,
        signature: Signature,
        op_type: str,
        cost: Cost,
        *,
        program: Program | None = None,
        fuses: tuple[Call, ...] = (),
        reference: Reference | None = None,
        rule: Rule | None = None,
    ) -> OpDef:
        return OpDef(
            name=self.entry.name,
            entry=self.entry,
            op_type=op_type,
            elements=self.elements,
            inputs=signature.inputs,
            outputs=signature.outputs,
            attrs=signature.attrs,
            where=self._conditions(signature),
            inplace=dict(self.entry.spec.inplace),
            cost=cost,
            program=program,
            fuses=fuses,
            reference=reference,
            triton=link_triton(self.entry, self.sink),
            rule=rule,
        )

    def _conditions(self, signature: Signature) -> tuple[Condition, ...]:
        scope, found = self._scope(signature), []
        scope.values.clear()
        for index, line in enumerate(self.entry.spec.where):
            with self.refusable():
                text = self.text(line, "where", index)
                value = Checker(text, scope).expression(parse_expression(text))
                if value.type.element != "truth":
                    message = f"expected a condition, got {value.type.element}"
                    raise text.refuse("SAGE107", message, None, "write a comparison: ... == 0")
                found.append(Condition(line, value))
        return tuple(found)


def never_negative(condition: Expr) -> Size | None:
    """The size that a condition on two sizes guarantees to be non-negative: D - Dr for `Dr <= D`."""
    match condition:
        case Binary(op="<=", a=DimRef(size=small), b=DimRef(size=large)):
            return large - small
        case Binary(op=">=", a=DimRef(size=large), b=DimRef(size=small)):
            return large - small
    return None


def _dims_of(signature: Signature) -> list[str]:
    """The dims of the operands and the dim attrs, in order; `R` stands for `...`."""
    types = [operand.type for operand in signature.inputs]
    symbols = [symbol for type_ in types for dim in type_.dims for symbol in dim.symbols]
    return list(dict.fromkeys([*symbols, *(attr.name for attr in signature.attrs if attr.type == "dim")]))


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


def _sum(sizes: list[Size]) -> Size:
    return sum(sizes, Size.of(0))


def _is_filled(kernel: KernelSpec | None) -> bool:
    return kernel is not None and bool(kernel.params or kernel.hooks or kernel.epilogue_of)


_MODULES = ("torch", "math", "wide", "dims", "triton", "tl", "device")
"""Module names in the files of generated functions, which an op must not shadow."""


def _is_op_name(name: str) -> bool:
    return _is_value_name(name) and len(name) > 1 and name not in _MODULES


def _is_value_name(name: str) -> bool:
    return (
        name.isascii() and name.isidentifier() and name == name.lower() and not name.startswith("_") and len(name) <= 40
    )
