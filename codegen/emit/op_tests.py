"""Emits a test per op with `cases`: `tests/test_norm.py` checks inference and the reference kernel on each of them.

For an overlay, cases are derived for the ops without any, and the kernels of all targets are tested too; those of the
package are tested by hand-written tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sageLLM.codegen.contents import Contents, Row, refs
from sageLLM.codegen.emit.derived_cases import Case, derived_cases
from sageLLM.codegen.expr.size import formula
from sageLLM.codegen.expr.tree import Expr, Gather, Ref, walk
from sageLLM.codegen.model.op import Attr, OpDef
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header

BASE = "sageLLM.generated"


@dataclass(frozen=True, slots=True)
class TestView:
    """One op to test: values for its attrs, and the dim that bounds each index input."""

    op: OpDef
    attrs: Mapping[str, bool | int | float | str]
    limits: Mapping[str, str]
    derived: Sequence[Case] = ()

    @property
    def cases(self) -> list[Case]:
        """The cases of the op, else derived ones."""
        return self.op.cases or list(self.derived)

    @property
    def kernel_check(self) -> dict[str, Any]:
        """The arguments of a comparison of kernels, over all cases."""
        cases = [*self.op.cases, *(case for case in self.derived if case not in self.op.cases)]
        return {"op": self.op.name, "cases": cases, "attrs": dict(self.attrs), "limits": dict(self.limits)}

    @property
    def row(self) -> Row:
        """The test as the table of cases needs it."""
        op = self.op
        return {"name": op.name, "ref": op.ref, "cases": op.cases, "attrs": self.attrs, "limits": self.limits}


def emit_op_tests(ops: Sequence[OpDef], specs: Specs, renderer: Renderer) -> list[Output]:
    """`tests/test_STEM.py` for one ops file, if one of its ops has cases."""
    derived = {op.name: derived_cases(op, specs.ops, test_attrs(op)) if specs.is_overlay else [] for op in ops}
    views = [TestView(op, test_attrs(op), index_limits(op, specs.ops), derived[op.name]) for op in ops]
    tests = [view for view in views if view.cases]
    if not tests:
        return []
    source, checks = tests[0].op.entry.doc.file, f"{BASE}.tests" if specs.is_overlay else ""
    text = header(source, tests[0].op.name)
    view = {"tests": tests, "source": source, "checks": checks, "is_overlay": specs.is_overlay}
    text += renderer.render("op_tests.py.jinja", **view)
    rows = tuple(test.row for test in tests)
    return [Output(f"tests/test_{ops[0].stem}.py", text, refs(rows), rows)]


def emit_op_checks(specs: Specs, renderer: Renderer) -> list[Output]:
    """The checks that the tests share; an overlay uses the package's."""
    if specs.is_overlay:
        return []
    checks = header("specs/ops", "op_checks") + renderer.render("op_checks.py.jinja")
    return [Output("tests/op_checks.py", checks)]


def emit_case_table(contents: Contents, renderer: Renderer) -> list[Output]:
    """`tests/cases.py` with CASES; not emitted for an overlay."""
    if contents.is_overlay:
        return []
    tests = [row for rows in contents.rows_by_stem("tests/test_{}.py").values() for row in rows]
    text = header("specs/ops", "cases") + renderer.render("op_cases.py.jinja", tests=tests)
    return [Output("tests/cases.py", text, refs(tests))]


def test_attrs(op: OpDef) -> dict[str, bool | int | float | str]:
    """A value for every required attr; dims come from the case."""
    return {attr.name: _value(attr) for attr in op.attrs if attr.is_required and attr.type != "dim"}


def _value(attr: Attr) -> bool | int | float | str:
    if attr.choices:
        return attr.choices[0]
    if attr.type == "i32" and attr.default is not None:
        return attr.default  # an offset other than the default might leave its table
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
    """The dim that bounds the values of each integer input that indexes a table."""
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
