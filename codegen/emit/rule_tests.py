"""Emits a test per rewrite rule: `tests/test_rules_fusion.py` runs pattern and replacement in float64.

def test_fused_add_rms_norm() -> None:
    pattern = (Call(Add, {"x": "x", "y": "residual"}, ("h",)), Call(RmsNorm, ...))
    check_rule(FuseNorm, "fused_add_rms_norm", pattern, ("y", "h"), cases, KERNELS, fused=FusedAddRmsNorm)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from sageLLM.codegen.emit.op_tests import BASE, test_attrs
from sageLLM.codegen.emit.passes import op_module
from sageLLM.codegen.model.op import Attr, AttrFormula, AttrName, OpDef, Scalar
from sageLLM.codegen.model.rule import PassDef, PatternCall, RuleDef
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header


@dataclass(frozen=True, slots=True)
class CallView:
    """A line of the pattern: operands and results by name, values of attributes, and dims of size attributes."""

    op: OpDef
    operands: tuple[tuple[str, str], ...]
    results: tuple[str, ...]
    attrs: tuple[tuple[str, Scalar | None], ...]
    sizes: tuple[tuple[str, str], ...]
    """The dim, or the formula of dims, of each size attribute: `Q`, `3 * Q`."""


@dataclass(frozen=True, slots=True)
class RuleTestView:
    """One rule to test, with the test cases of the first op that it inserts."""

    pass_: PassDef
    rule: RuleDef
    calls: tuple[CallView, ...]
    cases: list[dict[str, int | list[int]]]
    fused: OpDef | None
    """The op that the rule is derived from."""


def emit_rule_tests(specs: Specs, renderer: Renderer) -> list[Output]:
    """`tests/test_rules_STEM.py` for every pass file with rules."""
    by_file: dict[str, list[RuleTestView]] = {}
    for pass_ in specs.passes.values():
        if not specs.raw.is_base(pass_.entry):
            by_file.setdefault(pass_.entry.doc.file, []).extend(_view(pass_, rule) for rule in pass_.rules)
    return [_module(file, tests, specs, renderer) for file, tests in by_file.items() if tests]


def emit_rule_checks(specs: Specs, renderer: Renderer) -> list[Output]:
    """The checks that the tests share; an overlay uses the package's."""
    if specs.is_overlay:
        return []
    text = header("specs/passes", "rule_checks") + renderer.render("rule_checks.py.jinja")
    return [Output("tests/rule_checks.py", text)]


def _module(file: str, tests: list[RuleTestView], specs: Specs, renderer: Renderer) -> Output:
    stem = PurePosixPath(file).stem
    modules: dict[str, set[str]] = {f"..passes.{stem}": {test.pass_.class_name for test in tests}}
    for op in [*(call.op for test in tests for call in test.calls), *(test.fused for test in tests if test.fused)]:
        modules.setdefault(op_module(op, specs), set()).add(op.class_name)
    imports = [(module, sorted(names)) for module, names in sorted(modules.items())]
    base = BASE if specs.is_overlay else ""
    text = renderer.render("rule_tests.py.jinja", source=file, tests=tests, imports=imports, base=base)
    refs = tuple(dict.fromkeys(test.pass_.ref for test in tests))
    return Output(f"tests/test_rules_{stem}.py", header(file, tests[0].pass_.name) + text, refs)


def _view(pass_: PassDef, rule: RuleDef) -> RuleTestView:
    captured = _captured(rule)
    calls = tuple(_call(call, captured) for call in rule.pattern)
    is_derived = pass_.spec.rules[int(rule.path[1])].from_op is not None
    cases = (rule.replacement or rule.pattern)[0].op.cases
    return RuleTestView(pass_, rule, calls, cases, rule.replacement[0].op if is_derived else None)


def _captured(rule: RuleDef) -> dict[str, Scalar | None]:
    """The values of the attributes, other than dims, that names of the pattern stand for."""
    captured: dict[str, Scalar | None] = {}
    for call in rule.pattern:
        required = dict(test_attrs(call.op))
        for name, value in call.attrs:
            attr = call.op.attr(name)
            if attr is not None and attr.type != "dim" and isinstance(value, AttrName):
                captured.setdefault(value.name, _sample(attr, required, len(captured)))
    return captured


def _call(call: PatternCall, captured: Mapping[str, Scalar | None]) -> CallView:
    """The view of a line."""
    attrs: dict[str, Scalar | None] = dict(test_attrs(call.op))
    sizes = {attr.name: attr.name for attr in call.op.attrs if attr.type == "dim" and attr.is_required}
    for name, value in call.attrs:
        attr = call.op.attr(name)
        if attr is not None and isinstance(value, AttrName) and attr.type == "dim":
            sizes[name] = value.name
        elif attr is not None and isinstance(value, AttrFormula) and attr.type == "dim":
            sizes[name] = value.text
        elif isinstance(value, AttrFormula):
            attrs[name] = value.evaluate({one: float(captured[one] or 0) for one in value.names})
        elif attr is not None and isinstance(value, AttrName):
            attrs[name] = captured[value.name]
        else:
            sizes.pop(name, None)
            attrs[name] = value if not isinstance(value, AttrName) else None
    operands = tuple((name, value) for name, value in call.operands.items() if value is not None)
    return CallView(call.op, operands, call.targets, tuple(attrs.items()), tuple(sizes.items()))


def _sample(attr: Attr, required: Mapping[str, Scalar | None], index: int) -> Scalar | None:
    """An allowed value that differs from the default if possible, so that a rule that drops the attr fails.

    Required numbers have other values than those before them, so that a rule that swaps two of them fails.
    """
    if attr.name in required:
        value = required[attr.name]
        if attr.type != "f32" or attr.choices or not isinstance(value, float):
            return value
        return min(value + 0.25 * (index + 1), attr.max if attr.max is not None else math.inf)
    if attr.choices:
        return next((choice for choice in attr.choices if choice != attr.default), attr.default)
    match attr.type:
        case "bool":
            return not attr.default
        case "f32" | "i32":
            low = attr.min if attr.min is not None else 0
            wanted = low + (0.25 if attr.type == "f32" else 1)
            high = attr.max if attr.max is not None else wanted
            return float(min(wanted, high)) if attr.type == "f32" else int(min(wanted, high))
        case _:
            return attr.default
