"""Links op entries: a signature, the semantics from `compute`, `fuses` or `reference`, and the cost."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.expr.check import Checker
from sageLLM.codegen.expr.cost import program_flops, program_reads, program_writes
from sageLLM.codegen.expr.program import ProgramChecker, with_view_types
from sageLLM.codegen.expr.satisfiable import Kind, Kinds, may_hold
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.syntax import Refused, Text, parse_expression
from sageLLM.codegen.expr.tree import Binary, DimRef, Expr, Number, Program, View
from sageLLM.codegen.expr.views import parse_view
from sageLLM.codegen.link.calls import fused_cost, link_calls
from sageLLM.codegen.link.declared_cost import declared_cost
from sageLLM.codegen.link.hooks import link_reference
from sageLLM.codegen.link.op_checks import check_op
from sageLLM.codegen.link.signature import Signature, SignatureLinker
from sageLLM.codegen.link.templates import link_triton
from sageLLM.codegen.link.unused import check_unused
from sageLLM.codegen.load import Entry, RawSpecs, fused_names
from sageLLM.codegen.model.op import Call, Condition, Cost, OpDef, Reference, Rule, Template
from sageLLM.codegen.render import Renderer
from sageLLM.codegen.schema.ops import OpSpec

SEMANTICS = ("compute", "fuses", "reference")


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
        message = f"the fused ops {names} must not call each other in a cycle"
        sink.error("SAGE119", message, entry.key_span("fuses"), "define one of them by `compute`")


@dataclass(slots=True)
class OpLinker:
    """Links one entry, collecting the findings of all its fields."""

    entry: Entry[OpSpec]
    raw: RawSpecs
    linked: Mapping[str, OpDef]
    sink: Sink
    declarations: SignatureLinker = field(init=False)

    def __post_init__(self) -> None:
        self.declarations = SignatureLinker(self.entry, self.raw, self.sink)

    def link(self) -> OpDef | None:
        """The op, or None after a finding."""
        before = len(self.sink.diagnostics)
        signature = self.declarations.link()
        semantics = self._semantics() if signature is not None else None
        if signature is None or semantics is None:
            return None
        check_op(self.entry, signature, semantics, self.sink)
        kinds: dict[str, Callable[[Signature], OpDef | None]] = {
            "compute": self._computed,
            "fuses": self._fused,
            "reference": self._referenced,
        }
        op = kinds[semantics](signature)
        if op is not None and len(self.sink.diagnostics) == before:  # a misspelt use is reported already
            check_unused(op, self.sink)
        return op if len(self.sink.diagnostics) == before else None

    def _semantics(self) -> str | None:
        """The one field that defines the op."""
        fields = [key for key in SEMANTICS if getattr(self.entry.spec, key) is not None]
        if len(fields) == 1:
            return fields[0]
        found = " and ".join(f"`{key}`" for key in fields) or "none"
        message = f"'{self.entry.name}' must have one of `compute`, `fuses` and `reference`, got {found}"
        self.sink.error("SAGE118", message, self.entry.key_span(), "keep one of them" if fields else "add one of them")
        return None

    def _computed(self, signature: Signature) -> OpDef | None:
        spec, scope = self.entry.spec, signature.scope()
        inputs, outputs = signature.input_types, signature.output_types
        views: list[View] = []
        known = [size for condition in self._conditions(signature) if (size := never_negative(condition.value))]
        for name, text in spec.views.items():
            with suppress(Refused):
                operands = inputs | outputs | {view.name: view.type for view in views}
                views.append(parse_view(self._text(text, "views", name), name, operands, scope.dims, known))
                self.declarations.declare(name, views[-1].type, "views", name)
        if len(views) < len(spec.views) or spec.compute is None:
            return None
        scope = replace(with_view_types(scope, inputs, views), known=tuple(known))
        program = ProgramChecker(self._text(spec.compute, "compute"), scope, inputs, outputs, views).check()
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
        reference = link_reference(self.entry, signature.scope(), Renderer(self.raw.templates), self.sink)
        cost = declared_cost(self.entry, signature, self.sink)
        if reference is None or cost is None:
            return None
        return self._op(signature, self.entry.spec.op_type or "", cost, reference=reference)

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
            elements=signature.elements,
            inputs=signature.inputs,
            outputs=signature.outputs,
            attrs=signature.attrs,
            where=self._conditions(signature),
            inplace=dict(self.entry.spec.inplace),
            cost=cost,
            program=program,
            fuses=fuses,
            reference=reference,
            triton=self._triton(),
            rule=rule,
        )

    def _triton(self) -> Template | None:
        has_template = self.entry.spec.kernel is not None and self.entry.spec.kernel.triton is not None
        return link_triton(self.entry, Renderer(self.raw.templates), self.sink) if has_template else None

    def _conditions(self, signature: Signature) -> tuple[Condition, ...]:
        scope, found = signature.scope(), []
        scope.values.clear()
        for index, line in enumerate(self.entry.spec.where):
            with suppress(Refused):
                text = self._text(line, "where", index)
                value = Checker(text, scope).expression(parse_expression(text))
                if value.type.element != "truth":
                    message = f"expected a condition, got {value.type.element}"
                    raise text.refuse("SAGE107", message, None, "write a comparison: ... == 0")
                if not may_hold(parse_expression(text), _kinds_of(signature)):
                    message = f"no sizes and attrs satisfy `{line}`"
                    raise text.refuse("SAGE137", message, None, "correct the condition or remove it")
                found.append(Condition(line, value))
        return tuple(found)

    def _text(self, value: str, *path: str | int) -> Text:
        return Text.of(value, self.entry, path, self.sink)


def _kinds_of(signature: Signature) -> Kinds:
    """The kinds of the names in conditions: dims, and attrs by their type."""
    kinds: dict[str, Kind] = {"f32": "float", "i32": "int", "bool": "bool", "str": "text", "dim": "size"}
    attrs = {attr.name: attr for attr in signature.attrs}

    def kind(leaf: str) -> Kind | Sequence[object]:
        if leaf in signature.dims:
            return "size"
        attr = attrs.get(leaf)
        return "any" if attr is None else attr.choices or kinds[attr.type]

    return kind


def never_negative(condition: Expr) -> Size | None:
    """The size that a condition on two sizes guarantees to be non-negative: D - Dr for `Dr <= D`, less 1 for `<`."""
    if not isinstance(condition, Binary) or condition.op not in ("<", "<=", ">", ">="):
        return None
    a, b = _size_of(condition.a), _size_of(condition.b)
    if a is None or b is None:
        return None
    difference = b - a if condition.op in ("<", "<=") else a - b
    return difference - Size.of(1) if condition.op in ("<", ">") else difference


def _size_of(value: Expr) -> Size | None:
    match value:
        case DimRef(size=size):
            return size
        case Number(value=int() as number) if not isinstance(number, bool):
            return Size.of(number)
        case Binary(op="+" | "-" | "*" as op, a=a, b=b):
            x, y = _size_of(a), _size_of(b)
            if x is not None and y is not None:
                return x + y if op == "+" else x - y if op == "-" else x * y
    return None


def _sum(sizes: list[Size]) -> Size:
    return sum(sizes, Size.of(0))
