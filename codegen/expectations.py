"""Turns passes that fire more or less often than their specs expect into findings.

Who counts is given from outside: counting runs generated code, which the generator itself never imports.
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
"""What decides how often a rule fires. Where nothing of it changed, the counts that held still hold."""


class Missed(Protocol):
    """A pass and a model for which the count differs, in one stage, and why the rules did not fire elsewhere."""

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
"""Counts in a generated tree; the flag says whether it is an overlay, which needs the package's own tree beside it."""


def check_expectations(specs: Specs, outputs: Iterable[Output], count: Count) -> None:
    """Raises SpecErrors with a finding for every miss. The tree goes into a temporary folder to be counted."""
    with tempfile.TemporaryDirectory(prefix="sagellm-") as folder:
        write(outputs, Path(folder, "generated"))
        findings = [_finding(missed, specs) for missed in count(Path(folder, "generated"), specs.is_overlay)]
    if findings:
        raise SpecErrors(findings)


def _finding(missed: Missed, specs: Specs) -> Diagnostic:
    one = specs.passes[missed.pass_name]
    key = missed.model if missed.model in one.spec.expect else "*"
    text = str(one.spec.expect[key])
    wanted = text if text == str(missed.expected) else f"{text} = {missed.expected}"
    message = f"'{one.name}' fires {missed.fired} times in the {missed.stage} graph of {missed.model}, not {wanted}"
    return Diagnostic("SAGE340", message, one.entry.span("expect", key), "\n".join(missed.reasons) or None)
