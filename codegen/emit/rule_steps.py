"""Translates a rewrite rule to the steps of its generated function: find a node, check a condition, insert a call."""

from dataclasses import dataclass

from sageLLM.codegen.emit.rule_conditions import condition_text, negated, required_sizes
from sageLLM.codegen.model.op import Attr, AttrFormula, AttrName, AttrValue, OpDef
from sageLLM.codegen.model.rule import PatternCall, RuleDef, SearchStep
from sageLLM.codegen.render import lit

TAKEN = (
    "graph",
    "node",
    "consumer_of",
    "describe_consumers",
    "describe_producer",
    "dim_of",
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
    same: tuple[tuple[str, str], ...]


class RuleViewer:
    """Translates a rule to the steps of its function, from the anchor along values to producers and consumers."""

    def __init__(self, rule: RuleDef) -> None:
        self.rule = rule
        self.vars = self._variables()
        self.values: dict[str, str] = {}
        self.labels: dict[str, str] = {}
        self.attrs: dict[str, str] = {}
        self.steps: list[FindView | CheckView] = []
        self.computed: list[tuple[str, str, AttrFormula]] = []  # checked when all attrs are known

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
            tuple((self.values[result], self.values[value]) for result, value in self.rule.same),
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

    def _bind_attr(self, text: str, attr: str, value: AttrValue, num_found: int) -> None:
        if isinstance(value, AttrFormula):
            self.computed.append((text, attr, value))
        elif not isinstance(value, AttrName):
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
        """The attrs with formulas, and the rule's `where`. The rule does not fire while a size in it is symbolic."""
        for text, attr, formula in self.computed:
            self._check(f"{text} != {self._formula(formula)}", num_found, f"expected {attr} = {formula.text}")
        for condition in self.rule.where:
            for value, index in required_sizes(condition.node):
                asked = f"{self.values[value]}" + ("" if index is None else f", {index}")
                self._check(f"not is_known({asked})", num_found, f"the sizes in {condition.text} are not known yet")
            test = condition_text(negated(condition.node), self.values, self.attrs)
            self._check(test, num_found, f"needs {condition.text}")

    def _check(self, test: str, num_found: int, reason: str) -> None:
        self.steps.append(CheckView(test, num_found, reason))

    def _attr_text(self, value: AttrValue) -> str:
        match value:
            case AttrName(name=name):
                return self.attrs.get(name, "")
            case AttrFormula():
                return self._formula(value)
        return lit(value)

    def _formula(self, formula: AttrFormula) -> str:
        """The formula over the attrs of matched nodes; dims, which may be symbolic, are read by `dim_of`."""
        dims = {name for name, attr in self.rule.attrs_bound.items() if attr.type == "dim"}
        texts = {name: f"dim_of({text})" if name in dims else text for name, text in self.attrs.items()}
        return condition_text(formula.node, self.values, texts)

    def _new_call(self, call: PatternCall, var: str) -> NewCallView:
        inputs = [(name, self.values.get(v, lit(v))) for name, v in call.operands.items() if v is not None]
        attrs = [(name, self._attr_text(value)) for name, value in call.attrs]
        outputs = tuple(self.values.get(target, lit(target)) for target in call.targets)
        return NewCallView(var, call.op, tuple(inputs), tuple((name, text) for name, text in attrs if text), outputs)
