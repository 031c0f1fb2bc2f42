"""Emits a test per op with `cases`: `tests/test_norm.py` checks inference and the reference kernel on each of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from sageLLM.codegen.emit.reference import by_stem
from sageLLM.codegen.expr.size import formula
from sageLLM.codegen.expr.tree import Expr, Gather, Ref, walk
from sageLLM.codegen.model.op import Attr, OpDef
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header

BASE = "sageLLM.generated"


@dataclass(frozen=True, slots=True)
class TestView:
    """One op to test: values for its attrs, and below which dim each index input has to stay."""

    op: OpDef
    attrs: Mapping[str, bool | int | float | str]
    limits: Mapping[str, str]


def emit_op_tests(specs: Specs, renderer: Renderer) -> list[Output]:
    """`tests/test_STEM.py` for every ops file that has cases, and the checks that they share."""
    own = [op for op in specs.ops.values() if not specs.raw.is_base(op.entry) and op.cases]
    outputs = [_module(ops, specs, renderer) for ops in by_stem(own).values()]
    if not specs.is_overlay:
        tests = [TestView(op, test_attrs(op), index_limits(op, specs.ops)) for op in own]
        text = renderer.render("op_cases.py.jinja", tests=tests)
        outputs.append(Output("tests/cases.py", header("specs/ops", "cases") + text, tuple(op.ref for op in own)))
        text = renderer.render("op_checks.py.jinja")
        outputs.append(Output("tests/op_checks.py", header("specs/ops", "op_checks") + text))
        text = header("specs", "tests") + '"""Tests of the generated code."""\n'
        outputs.append(Output("tests/__init__.py", text))
    return outputs


def _module(ops: list[OpDef], specs: Specs, renderer: Renderer) -> Output:
    tests = [TestView(op, test_attrs(op), index_limits(op, specs.ops)) for op in ops]
    text = renderer.render("op_tests.py.jinja", tests=tests, source=ops[0].entry.doc.file,
                           checks=f"{BASE}.tests" if specs.is_overlay else "")  # fmt: skip
    return Output(
        f"tests/test_{ops[0].stem}.py", header(ops[0].entry.doc.file, ops[0].name) + text, tuple(op.ref for op in ops)
    )


def test_attrs(op: OpDef) -> dict[str, bool | int | float | str]:
    """A value for every attr that has no default of its own; dims come from the case."""
    return {attr.name: _value(attr) for attr in op.attrs if attr.is_required and attr.type != "dim"}


def _value(attr: Attr) -> bool | int | float | str:
    if attr.choices:
        return attr.choices[0]
    if attr.type == "i32" and attr.default is not None:
        return attr.default  # an index that is moved stays within its table
    low, high = attr.min, attr.max
    number = 1.0 if low is None and high is None else low + 1 if low is not None and high is None else high or 0
    in_range = min(number, high) if high is not None else number
    values: dict[str, bool | int | float | str] = {
        "f32": float(in_range),
        "i32": int(in_range),
        "bool": True,
        "str": "x",
    }
    return values[attr.type]


def index_limits(op: OpDef, ops: Mapping[str, OpDef]) -> dict[str, str]:
    """For each integer input that indexes a table: the dim that it has to stay below."""
    found: dict[str, str] = {}
    for statement in op.program.statements if op.program else ():
        for node in walk(statement.value):
            if isinstance(node, Gather):
                found |= {name: formula(node.dim) for name in _plain_refs(node.index)}
    for call in op.fuses:
        callee = ops[call.op]
        inner = index_limits(callee, ops)
        names = {o.name: arg for o, arg in zip(callee.inputs, call.args, strict=False)}
        found |= {arg: limit for name, limit in inner.items() if (arg := names.get(name)) is not None}
    return {name: limit for name, limit in found.items() if op.operand(name) is not None}


def _plain_refs(index: Expr) -> list[str]:
    return [node.name for node in walk(index) if isinstance(node, Ref)]
