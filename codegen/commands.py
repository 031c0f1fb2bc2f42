"""Subcommands of the generator. Each prints its result and returns the exit code."""

import dataclasses
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sageLLM.codegen import driver
from sageLLM.codegen.diagnostics import Diagnostic, SpecErrors, render
from sageLLM.codegen.folders import find_file, spec_files

if TYPE_CHECKING:
    from sageLLM.codegen.expectations import Count

FINE, FAILED, USAGE, FINDINGS = 0, 1, 2, 100
OVERLAY = "my_specs"
"""The folder of new entries if the package is installed, in the current folder."""


class Generate:
    """`sagellm generate` and `lint` for the package's specs and overlays; `count` counts rewrites."""

    def __init__(
        self, overlays: Sequence[Path], out: Path | None, *, as_json: bool = False, count: "Count | None" = None
    ) -> None:
        self.overlays = list(overlays)
        self.out = out
        self.as_json = as_json
        self.count = count

    def write(self) -> int:
        """Updates the tree and prints the changed files."""
        if self._lacks_out():
            return USAGE
        return self._guarded(self._write)

    def check(self) -> int:
        """Reports drift between specs and tree. Any other error also fails."""
        if self._lacks_out():
            return USAGE
        return self._guarded(self._check)

    def lint(self) -> int:
        return self._guarded(self._lint)

    def with_fresh_tree(self, show: Callable[[Path, Path, bool], int]) -> int:
        """Generates into a temporary folder and calls show(old tree, new tree, as_json)."""
        if self._lacks_out():
            return USAGE

        def run() -> int:
            with tempfile.TemporaryDirectory(prefix="sagellm-") as folder:
                driver.generate(self.overlays, Path(folder, "generated"))
                return show(self.out or driver.BASE_OUT, Path(folder, "generated"), self.as_json)

        return self._guarded(run)

    def _write(self) -> int:
        start = time.perf_counter()
        written = driver.generate(self.overlays, self.out or driver.BASE_OUT, count=self.count)
        seconds = time.perf_counter() - start
        if self.as_json:
            print(json.dumps(dataclasses.asdict(written) | {"seconds": round(seconds, 3)}))
            return FINE
        for path in written.changed:
            print(f"wrote {path}")
        for path in written.removed:
            print(f"removed {path}")
        for note in written.notes:
            print(note)
        for path in written.kept:
            _log(f"kept {path}: no longer generated, but edited; delete it if it is not needed")
        _log(f"{len(written.changed)} written, {len(written.removed)} removed, {written.unchanged} unchanged")
        return FINE

    def _check(self) -> int:
        lines = driver.check(self.overlays, self.out or driver.BASE_OUT, count=self.count)
        if self.as_json:
            print(json.dumps({"drift": lines}))
        elif lines:
            print("\n".join(f"error[SAGE506]: {line}" for line in lines))
            _log("the generated tree does not match the specs: run `make generate` and commit the result")
        return FINDINGS if lines else FINE

    def _lint(self) -> int:
        specs = driver.load_and_link(self.overlays)
        counts = {"ops": len(specs.ops), "models": len(specs.models), "passes": len(specs.passes)}
        if self.as_json:
            print(json.dumps({"diagnostics": []} | counts))
        else:
            _log("no findings in " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
        return FINE

    def _lacks_out(self) -> bool:
        if self.overlays and self.out is None:
            _log("--specs requires --out FOLDER: an overlay is generated into a separate folder")
            return True
        return False

    def _guarded(self, run: Callable[[], int]) -> int:
        try:
            return run()
        except SpecErrors as errors:
            self._print(errors.diagnostics)
            return FAILED if any(d.code.startswith("SAGE5") for d in errors.diagnostics) else FINDINGS

    def _print(self, diagnostics: list[Diagnostic]) -> None:
        if self.as_json:
            print(json.dumps({"diagnostics": [dataclasses.asdict(d) for d in diagnostics]}))
            return
        read_line = LineReader([driver.BASE_SPECS, *self.overlays])
        print("\n".join(render(diagnostic, read_line) for diagnostic in diagnostics))
        _log(f"{len(diagnostics)} error{'s' * (len(diagnostics) != 1)}")


class LineReader:
    """Reads the source line of a diagnostic; the package's spec folder is the first."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders

    def __call__(self, file: str, line: int) -> str | None:
        path = find_file(file, self._folders)
        try:
            return path.read_text(encoding="utf-8").split("\n")[line - 1] if path else None
        except (OSError, UnicodeDecodeError, IndexError):
            return None


def explain_name(name: str, overlays: Sequence[Path], out: Path | None) -> int:
    """Prints the explanation of a name; an unknown name is an error that suggests similar ones."""
    from sageLLM.codegen.explain import explain

    def run() -> int:
        text = explain(name, driver.load_and_link(overlays), out or driver.BASE_OUT)
        print(text.rstrip())
        return FINE

    try:
        return Generate(overlays, out)._guarded(run)
    except LookupError as error:
        _log(str(error.args[0]))
        return FAILED


def new_entry(kind: str, name: str, specs: Path | None) -> int:
    """Writes the scaffold of an op, model, pass, format, dialect or deployment and prints the next step.

    Without `specs`, a checkout gets it in its own specs; an installed package is left alone, and the scaffold is
    written to an overlay in the current folder.
    """
    folder = specs or (driver.BASE_SPECS if driver.IS_CHECKOUT else Path(OVERLAY))
    is_base = folder.resolve() == driver.BASE_SPECS
    try:
        folders = [folder] if not is_base and any(folder.rglob("*.yaml")) else []
        paths = _scaffold(kind, name, folder, folders)
    except (ValueError, OSError) as error:
        _log(str(error))
        return FAILED
    except SpecErrors as errors:
        Generate(folders, None)._print(errors.diagnostics)
        return FINDINGS
    if findings := _findings_in(paths, [] if is_base else [folder]):
        for path in paths:
            path.unlink()
        print("\n".join(findings))
        _log(f"the name '{name}' cannot be used; nothing was written")
        return FINDINGS
    print(*paths, sep="\n")
    if specs is None and not is_base:
        _log(f"sageLLM is installed rather than a checkout, so that the new entry is in {folder.resolve()}")
    next_step = f"sagellm generate --specs {shlex.quote(str(folder))} --out my_generated"
    if kind == "deploy":  # no code is generated from it
        next_step = f"sagellm deploy {name if is_base else shlex.quote(str(paths[0]))}"
    _log("now edit it and run `make generate`" if is_base and kind != "deploy" else f"now edit it, then: {next_step}")
    return FINE


def _scaffold(kind: str, name: str, folder: Path, overlays: Sequence[Path]) -> list[Path]:
    """Writes the files; ValueError for a name that is taken."""
    from sageLLM.codegen.load import load_specs
    from sageLLM.codegen.scaffold import scaffold, why_taken

    if reason := why_taken(kind, name, load_specs([driver.BASE_SPECS, *overlays])):
        raise ValueError(reason)
    return scaffold(kind, name, folder)


def _findings_in(paths: Sequence[Path], overlays: Sequence[Path]) -> list[str]:
    """The findings that new files lead to, e.g. because their names collide with others in generated code."""
    folders = [driver.BASE_SPECS, *overlays]
    try:
        driver.load_and_link(overlays)
    except SpecErrors as errors:
        new = {name for group in spec_files(folders) for name, path in group.items() if path in paths}
        places = {found: [found.span, *(span for _, span in found.related)] for found in errors.diagnostics}
        concerned = [found for found, spans in places.items() if any(span and span.file in new for span in spans)]
        return [render(found, LineReader(folders)) for found in concerned]
    return []


def _log(text: str) -> None:
    print(text, file=sys.stderr)
