"""Emits passes: a function per rewrite rule, a class per pass, and the table of all in pipeline order.

def fused_add_rms_norm(graph: ExecutionGraph, node: OpNode) -> Rewrite | NearMiss | None:
    if not isinstance(node, RmsNorm):
        return None
    add = graph.producer(node.x)
    if not isinstance(add, Add):
        return NearMiss(1, ...)
    ...
    return Rewrite(...)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from sageLLM.codegen.contents import Row
from sageLLM.codegen.emit.pass_fields import ENGINES, OP_FIELDS, fields_of, function_of
from sageLLM.codegen.emit.rule_conditions import condition_text, negated, required_sizes
from sageLLM.codegen.model.op import Attr, AttrName, OpDef, Scalar
from sageLLM.codegen.model.rule import PassDef, PatternCall, RuleDef, SearchStep
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header, lit

TAKEN = (
    "graph",
    "node",
    "consumer_of",
    "describe_consumers",
    "describe_producer",
    "has_default",
    "is_known",
    "size_of",
    "replacement",
    *(f"replacement_{i}" for i in range(1, 10)),
)  # by the function


@dataclass(frozen=True, slots=True)
class FindView:
    """A node of the pattern, found as the producer or a consumer of a known value."""

    var: str
    op: OpDef
    value: str
    label: str
    is_consumer: bool
    num_found: int


@dataclass(frozen=True, slots=True)
class CheckView:
    """A condition under which the rule does not apply, in Python, and the reason for the user."""

    test: str
    num_found: int
    reason: str


@dataclass(frozen=True, slots=True)
class NewCallView:
    """An inserted op: Python text for each operand, attribute and output."""

    var: str
    op: OpDef
    inputs: tuple[tuple[str, str], ...]
    attrs: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RuleView:
    """One rule as the steps of its generated function."""

    rule: RuleDef
    anchor: str
    steps: tuple[FindView | CheckView, ...]
    matched: tuple[str, ...]
    calls: tuple[NewCallView, ...]
    kept: tuple[str, ...]


def emit_passes(specs: Specs, renderer: Renderer) -> list[Output]:
    """`passes/fusion.py` for `specs/passes/fusion.yaml`, and `passes/__init__.py`."""
    own = [pass_ for pass_ in specs.passes.values() if not specs.raw.is_base(pass_.entry)]
    by_file: dict[str, list[PassDef]] = {}
    for pass_ in own:
        by_file.setdefault(pass_.entry.doc.file, []).append(pass_)
    outputs = [_module(file, passes, specs, renderer) for file, passes in by_file.items()]
    return [*outputs, _registry(own, specs, renderer)]


def _module(file: str, passes: list[PassDef], specs: Specs, renderer: Renderer) -> Output:
    rules = {pass_.name: [RuleViewer(rule).view() for rule in pass_.rules] for pass_ in passes}
    text = renderer.render(
        "passes.py.jinja",
        source=file,
        passes=passes,
        rules=rules,
        fields={pass_.name: fields_of(pass_, specs) for pass_ in passes},
        engines=ENGINES,
        function_modules=sorted({function_of(pass_)[0] for pass_ in passes if pass_.spec.function is not None}),
        op_imports=_op_imports(passes, specs),
    )
    entries = tuple(pass_.ref for pass_ in passes)
    rows = tuple(row for pass_ in passes for row in rule_rows(pass_))
    return Output(f"passes/{_stem(file)}.py", header(file, passes[0].name) + text, entries, rows)


def rule_rows(pass_: PassDef) -> list[Row]:
    """For each rule of a pass the ops that it rewrites, and those that it puts in their place."""
    return [
        {
            "rule": rule.name,
            "pass": pass_.name,
            "consumes": list(dict.fromkeys(call.op.name for call in rule.pattern)),
            "produces": list(dict.fromkeys(call.op.name for call in rule.replacement)),
        }
        for rule in pass_.rules
    ]


def _registry(passes: list[PassDef], specs: Specs, renderer: Renderer) -> Output:
    modules: dict[str, list[str]] = {}
    for pass_ in passes:
        modules.setdefault(_stem(pass_.entry.doc.file), []).append(pass_.class_name)
    text = renderer.render("passes_registry.py.jinja", passes=passes, modules=sorted(modules.items()))
    return Output("passes/__init__.py", header("specs/passes", "passes") + text)


def _stem(file: str) -> str:
    return PurePosixPath(file).stem


def _op_imports(passes: Iterable[PassDef], specs: Specs) -> list[tuple[str, list[str]]]:
    """The node classes that rules and fields name, by module."""
    modules: dict[str, set[str]] = {}
    for rule in (rule for pass_ in passes for rule in pass_.rules):
        for call in (*rule.pattern, *rule.replacement):
            modules.setdefault(op_module(call.op, specs), set()).add(call.op.class_name)
    for name in (name for pass_ in passes for field in OP_FIELDS if (name := getattr(pass_.spec, field)) is not None):
        modules.setdefault(op_module(specs.ops[name], specs), set()).add(specs.ops[name].class_name)
    return [(module, sorted(names)) for module, names in sorted(modules.items())]


def op_module(op: OpDef, specs: Specs) -> str:
    """The module of an op, as imported by a generated pass: relative, or absolute from an overlay into the package."""
    package = "sageLLM.generated.ops" if specs.is_overlay and specs.raw.is_base(op.entry) else "..ops"
    return f"{package}.{op.stem}"


class RuleViewer:
    """Translates a rule to the steps of its function, from the anchor along values to producers and consumers."""

    def __init__(self, rule: RuleDef) -> None:
        self.rule = rule
        self.vars = self._variables()
        self.values: dict[str, str] = {}
        self.labels: dict[str, str] = {}
        self.attrs: dict[str, str] = {}
        self.steps: list[FindView | CheckView] = []

    def view(self) -> RuleView:
        anchor = len(self.rule.pattern) - 1
        self._bind(anchor, 1)
        for num_found, step in enumerate(self.rule.search(), start=1):
            self._find(step, num_found)
            self._bind(step.position, num_found + 1)
        self._check_conditions(len(self.rule.pattern))
        return RuleView(
            self.rule,
            self.vars[anchor],
            tuple(self.steps),
            tuple(self.vars),
            tuple(map(self._new_call, self.rule.replacement, self._replacements())),
            tuple(self.values[name] for name in self.rule.keep),
        )

    def _variables(self) -> list[str]:
        """A variable per node: the name of its op, numbered if an op occurs twice; the anchor is `node`."""
        ops = [call.op.name for call in self.rule.pattern[:-1]]
        names: list[str] = []
        for i, op in enumerate(ops):
            name = f"{op}_{ops[:i].count(op) + 1}" if op in ops[:i] else op
            while name in (*names, *TAKEN):
                name += "_"
            names.append(name)
        return [*names, "node"]

    def _label(self, index: int) -> str:
        """The name of a node in near-miss reasons: that of its op, numbered if the op occurs twice."""
        ops = [call.op.name for call in self.rule.pattern]
        before = ops[:index].count(ops[index])
        return f"{ops[index]}_{before + 1}" if before else ops[index]

    def _replacements(self) -> list[str]:
        """A variable per inserted op."""
        count = len(self.rule.replacement)
        return ["replacement"] if count == 1 else [f"replacement_{i}" for i in range(1, count + 1)]

    def _find(self, step: SearchStep, num_found: int) -> None:
        call, var = self.rule.pattern[step.position], self.vars[step.position]
        is_consumer = step.via not in call.targets
        self.steps.append(FindView(var, call.op, self.values[step.via], self.labels[step.via], is_consumer, num_found))

    def _bind(self, index: int, num_found: int) -> None:
        """Binds the values and attrs of a node to Python text, and checks those that are bound already."""
        call, var = self.rule.pattern[index], self.vars[index]
        for name, output in zip(call.targets, call.op.outputs, strict=True):
            text = f"{var}.{output.name}"
            if name in self.values and len(call.op.outputs) > 1:
                self._check(
                    f"{text}.name != {self.values[name]}.name",
                    num_found,
                    f"expected {self.labels[name]} to be {self._label(index)}.{output.name}",
                )
            self.values[name] = text
            self.labels.setdefault(name, f"{self._label(index)}.{output.name}")
        for operand, read in call.operands.items():
            self._bind_operand(index, operand, read, num_found)
        for attr, value in call.attrs:
            declared = call.op.attr(attr)
            is_dim = declared is not None and declared.type == "dim"
            self._bind_attr(f"{var}.attrs[{lit(attr)}]" if is_dim else f"{var}.{attr}", attr, value, num_found)
        for unnamed in call.op.attrs:
            if unnamed.name not in dict(call.attrs) and not unnamed.is_required:
                self._check_default(unnamed, var, num_found)

    def _bind_operand(self, index: int, operand: str, value: str | None, num_found: int) -> None:
        call, text, label = self.rule.pattern[index], f"{self.vars[index]}.{operand}", self._label(index)
        declared = call.op.operand(operand)
        if value is None:
            self._check(f"{text} is not None", num_found, f"expected {label} without {operand}")
            return
        may_be_absent = value in self.rule.optional
        if declared is not None and declared.optional and not may_be_absent:
            self._check(f"{text} is None", num_found, f"expected {label} with {operand}")
        if value in self.values:
            name = "" if may_be_absent else ".name"
            self._check(
                f"{text}{name} != {self.values[value]}{name}",
                num_found,
                f"expected {label}.{operand} to be {self.labels[value]}",
            )
        self.values.setdefault(value, text)
        self.labels.setdefault(value, f"{label}.{operand}")

    def _bind_attr(self, text: str, attr: str, value: AttrName | Scalar | None, num_found: int) -> None:
        if not isinstance(value, AttrName):
            self._check(f"{text} != {lit(value)}", num_found, f"expected {attr} = {value}")
        elif value.name in self.attrs:
            self._check(f"{text} != {self.attrs[value.name]}", num_found, f"expected equal {value.name}")
        else:
            self.attrs[value.name] = text

    def _check_default(self, attr: Attr, var: str, num_found: int) -> None:
        """A pattern that omits an attribute matches only its default."""
        test = f"not has_default({var}, {lit(attr.name)})"
        if attr.formula is None:
            test = (
                f"{var}.{attr.name} is not None"
                if attr.default is None
                else f"{var}.{attr.name} != {lit(attr.default)}"
            )
        self._check(test, num_found, f"expected the default {attr.name}")

    def _check_conditions(self, num_found: int) -> None:
        """The rule's `where`. The rule does not fire while a size in it is symbolic."""
        for condition in self.rule.where:
            for value, index in required_sizes(condition.node):
                asked = f"{self.values[value]}" + ("" if index is None else f", {index}")
                self._check(f"not is_known({asked})", num_found, f"the sizes in {condition.text} are not known yet")
            test = condition_text(negated(condition.node), self.values, self.attrs)
            self._check(test, num_found, f"needs {condition.text}")

    def _check(self, test: str, num_found: int, reason: str) -> None:
        self.steps.append(CheckView(test, num_found, reason))

    def _new_call(self, call: PatternCall, var: str) -> NewCallView:
        inputs = [(name, self.values.get(v, lit(v))) for name, v in call.operands.items() if v is not None]
        attrs = [
            (name, self.attrs.get(value.name, "") if isinstance(value, AttrName) else lit(value))
            for name, value in call.attrs
        ]
        outputs = tuple(self.values.get(target, lit(target)) for target in call.targets)
        return NewCallView(var, call.op, tuple(inputs), tuple((name, text) for name, text in attrs if text), outputs)
