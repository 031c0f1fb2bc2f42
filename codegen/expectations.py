"""Reports passes that fire more or less often than their specs expect, and layouts that `tests.tiny` does not fit.

The counting function is passed in, because counting runs generated code, which the generator never imports.
"""

import ast
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from sageLLM.codegen.diagnostics import Diagnostic, SpecErrors
from sageLLM.codegen.load import RawSpecs
from sageLLM.codegen.render import Output
from sageLLM.codegen.writer import write_plainly

COUNTED = ("builders/", "ops/", "passes/")
"""Outputs that the counts depend on; while their code is unchanged, counts that held still hold."""


class Missed(Protocol):
    """A pass and a model with another count than expected in one stage; the reasons why rules did not fire."""

    @property
    def pass_name(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def stage(self) -> str: ...
    @property
    def fired(self) -> int: ...
    @property
    def expected(self) -> int: ...
    @property
    def reasons(self) -> Sequence[str]: ...


@runtime_checkable
class Unbuilt(Protocol):
    """A model that cannot be built from its `tests.tiny`: the config is refused, or the graph of a stage fails."""

    @property
    def model(self) -> str: ...
    @property
    def stage(self) -> str | None: ...
    @property
    def error(self) -> str: ...


Count = Callable[[Path, bool], Iterable[Missed | Unbuilt]]
"""Counts in a generated tree; the flag is set for an overlay, which needs the package's own tree as well."""


def check_expectations(raw: RawSpecs, outputs: Iterable[Output], count: Count) -> None:
    """Raises SpecErrors with a finding for every miss. The tree is written to a temporary folder and counted there."""
    with tempfile.TemporaryDirectory(prefix="sagellm-") as folder:
        write_plainly(outputs, Path(folder, "generated"))
        found = count(Path(folder, "generated"), bool(raw.base_files))
        findings = [_unbuilt(one, raw) if isinstance(one, Unbuilt) else _finding(one, raw) for one in found]
    if findings:
        raise SpecErrors(findings)


def _finding(missed: Missed, raw: RawSpecs) -> Diagnostic:
    one = raw.passes[missed.pass_name]
    formula, index = one.spec.group_of(missed.model)
    count = formula if formula == str(missed.expected) else f"{formula} = {missed.expected}"
    where = f"in the {missed.stage} graph of {missed.model}"
    message = f"expected '{one.name}' to fire {count} times {where}, got {missed.fired}"
    return Diagnostic(
        "SAGE340",
        message,
        one.span("expect", formula, index),
        "\n".join(missed.reasons) or f"write {missed.fired} if this is right",
    )


def _unbuilt(one: Unbuilt, raw: RawSpecs) -> Diagnostic:
    entry = raw.models[one.model]
    if one.stage is None:
        help = "add or change the key in tests.tiny, or write a default for its config name"
        return Diagnostic("SAGE254", one.error, entry.span("tests", "tiny"), help)
    message = f"the {one.stage} graph of '{one.model}' cannot be built from tests.tiny: {one.error}"
    return Diagnostic("SAGE254", message, entry.span("tests", "tiny"), "sizes must fit the layout; change one of them")


COSTS = {"flop_formula", "byte_formula"}
"""Fields of op classes that no rule reads: conditions of rules are about sizes and types."""


def counts_alike(before: str, after: str) -> bool:
    """Whether two Python files differ at most in prose, layout and costs, so that rules fire as often with both."""
    try:
        return _counted_code(before) == _counted_code(after)
    except SyntaxError:
        return False


def _counted_code(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            has_docstring = ast.get_docstring(node, clean=False) is not None
            node.body = [inner for inner in node.body[has_docstring:] if not _is_cost(inner)]
    return ast.dump(tree)


def _is_cost(node: ast.stmt) -> bool:
    match node:
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name in COSTS
    return False
