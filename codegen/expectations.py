"""Reports passes that fire more or less often than their specs expect.

The counting function is passed in, because counting runs generated code, which the generator never imports.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from sageLLM.codegen.diagnostics import Diagnostic, SpecErrors
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output
from sageLLM.codegen.writer import write

COUNTED = ("builders/", "ops/", "passes/")
"""Outputs that the counts depend on; while they are unchanged, counts that held still hold."""


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


Count = Callable[[Path, bool], Iterable[Missed]]
"""Counts in a generated tree; the flag is set for an overlay, which needs the package's own tree as well."""


def check_expectations(specs: Specs, outputs: Iterable[Output], count: Count) -> None:
    """Raises SpecErrors with a finding for every miss. The tree is written to a temporary folder and counted there."""
    with tempfile.TemporaryDirectory(prefix="sagellm-") as folder:
        write(outputs, Path(folder, "generated"))
        findings = [_finding(missed, specs) for missed in count(Path(folder, "generated"), specs.is_overlay)]
    if findings:
        raise SpecErrors(findings)


def _finding(missed: Missed, specs: Specs) -> Diagnostic:
    one = specs.passes[missed.pass_name]
    formula, index = one.spec.group_of(missed.model)
    count = formula if formula == str(missed.expected) else f"{formula} = {missed.expected}"
    where = f"in the {missed.stage} graph of {missed.model}"
    message = f"expected '{one.name}' to fire {count} times {where}, got {missed.fired}"
    return Diagnostic("SAGE340", message, one.entry.span("expect", formula, index), "\n".join(missed.reasons) or None)
