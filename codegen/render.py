"""Renders templates. Values pass through filters that cannot inject code."""

import json
import keyword
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sageLLM.codegen.contents import Row
from sageLLM.codegen.diagnostics import Diagnostic, Span, SpecErrors
from sageLLM.codegen.folders import TEMPLATES
from sageLLM.codegen.state import CPP_STYLE, cache_folder

LINE_LENGTH = 120


@dataclass(frozen=True, slots=True)
class Output:
    """One generated file: path relative to the generated folder, text, and the spec entries that it comes from.

    `rows` are its contributions to the tables of other files, `notes` are shown if it or a file of its stem changes.
    """

    path: str
    text: str
    entries: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()


class Renderer:
    """The template environment. A missing name is an error; every value passes through `ident`, `lit` or `doc`.

    `overlay` are kernel templates of overlays in addition to those of the package, see `folders.template_files`.
    """

    def __init__(self, overlay: Mapping[str, tuple[str, Path]] = MappingProxyType({})) -> None:
        # Imported here, since a run that finds everything up to date renders nothing.
        from jinja2 import StrictUndefined
        from jinja2.bccache import FileSystemBytecodeCache
        from jinja2.loaders import ChoiceLoader, FileSystemLoader, FunctionLoader
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._overlay = overlay
        self.env = ImmutableSandboxedEnvironment(
            loader=ChoiceLoader([FileSystemLoader(TEMPLATES), FunctionLoader(self._overlay_text)]),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            auto_reload=False,
            bytecode_cache=FileSystemBytecodeCache(str(cache)) if (cache := _template_cache()) else None,
        )
        self.env.filters |= {"ident": ident, "lit": lit, "doc": doc, "comment": comment, "wrap": wrap}
        self.env.filters |= {"cpp_comment": cpp_comment, "json": json.dumps}

    def render(self, template: str, **view: Any) -> str:
        """The text of a template. Raises SpecErrors if a template of an overlay fails."""
        if template not in self._overlay:
            return self.env.get_template(template).render(**view)
        try:
            return self.env.get_template(template).render(**view)
        except Exception as error:  # a template may raise anything
            raise SpecErrors([self._failure(template, error)]) from None

    def find(self, template: str) -> Path | None:
        """The file of a template of the package or of an overlay."""
        if template in self._overlay:
            return self._overlay[template][1]
        return TEMPLATES / template if (TEMPLATES / template).is_file() else None

    def display(self, template: str) -> str:
        """The name of a template in diagnostics."""
        return self._overlay[template][0] if template in self._overlay else f"templates/{template}"

    def _overlay_text(self, name: str) -> "tuple[str, str, Callable[[], bool]] | None":
        if name not in self._overlay:
            return None
        path = self._overlay[name][1]
        return path.read_text(encoding="utf-8"), str(path), lambda: True

    def _failure(self, template: str, error: Exception) -> Diagnostic:
        """The finding for an error in the template of an overlay, at the line that raised it."""
        display, path = self._overlay[template]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None) or 1
        message = f"the template fails: {str(error) or type(error).__name__}"
        return Diagnostic("SAGE123", message, Span(display, line, 1), "correct the template")


def _template_cache() -> Path | None:
    """The folder of compiled templates, which save half of the time of a render; None if it cannot be used.

    Loading a compiled template runs its code, so other users must not be able to write to the folder.
    """
    try:
        folder = cache_folder() / "templates"
        for path in (*reversed(folder.parents), folder):
            path.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):
        return None
    is_private = not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)
    return folder if is_private and os.access(folder, os.W_OK) else None


def header(source: str, explain: str) -> str:
    """The first two lines of a generated Python file."""
    return (
        f"# Code generated by sagellm from {comment(source)}. DO NOT EDIT.\n"
        f"# Regenerate: make generate    Explain: make explain NAME={comment(explain)}\n"
    )


def ident(name: str) -> str:
    """A Python identifier; anything else raises ValueError, so that no text can become code."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"expected an identifier, got {name!r}")
    return name


def lit(value: Any) -> str:
    """A Python literal. Text is escaped to ASCII, so that no control character reaches a source file."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def doc(text: str, indent: int = 4) -> str:
    """Text for a triple-quoted docstring, without quote runs, escapes and control characters."""
    safe = "".join(c if c == "\n" or not unicodedata.category(c).startswith("C") else "?" for c in text)
    safe = safe.replace("\\", "\\\\").replace('"""', "'''")
    safe = safe[:-1] + "'" if safe.endswith('"') else safe
    return textwrap.indent(safe.strip(), " " * indent).strip()


def comment(text: str) -> str:
    """Text for one comment line."""
    return "".join(c if c.isprintable() else "?" for c in text)


def cpp_comment(text: str) -> str:
    """Text for one `//` line. A trailing backslash is replaced, because it would continue the comment."""
    return comment(text).replace("\\", "/")


def wrap(text: str, width: int = 100, indent: int = 4) -> str:
    """Prose wrapped at `width` columns, continuation lines indented."""
    lines = textwrap.wrap(" ".join(text.split()), width=width - indent)
    return ("\n" + " " * indent).join(lines)


def format_sources(outputs: Iterable[Output]) -> list[Output]:
    """All outputs, the Python and C++ ones formatted by the pinned formatters in one call each."""
    outputs = list(outputs)
    sources = [output for output in outputs if output.path.endswith((".py", ".cpp"))]
    with tempfile.TemporaryDirectory(prefix="sagellm-") as folder:
        paths = {output.path: Path(folder, output.path) for output in sources}
        for output in sources:
            paths[output.path].parent.mkdir(parents=True, exist_ok=True)
            paths[output.path].write_text(output.text, encoding="utf-8")
        # The two formatters run at the same time; together they take a fifth of an update after a small change.
        with _cpp_formatter([path for path in paths.values() if path.suffix == ".cpp"]):
            if any(path.suffix == ".py" for path in paths.values()):
                _format_python(Path(folder))
        texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    return [replace(output, text=texts.get(output.path, output.text)) for output in outputs]


_FORMATTER_OPTIONS = ("--isolated", "--no-cache", "--quiet", "--target-version=py311")


def _tool(name: str) -> Path:
    """A formatter that was installed with this package."""
    name = f"{name}.exe" if os.name == "nt" else name
    beside = Path(sys.executable).with_name(name)
    return beside if beside.is_file() else Path(sysconfig.get_path("scripts"), name)


@contextmanager
def _cpp_formatter(paths: Sequence[Path]) -> Iterator[None]:
    """Formats the files in place while the body runs. clang-format accepts any text, so this finds no errors in it."""
    if not paths:
        yield
        return
    # The script of this name in `bin` would start a second Python.
    package = find_spec("clang_format")
    if package is None or package.origin is None:
        raise _missing("clang-format", "its Python package is not installed")
    program = (
        Path(package.origin).with_name("data") / "bin" / ("clang-format.exe" if os.name == "nt" else "clang-format")
    )
    try:
        running = subprocess.Popen([program, f"--style=file:{CPP_STYLE}", "-i", *paths])
    except OSError as error:
        raise _missing("clang-format", str(error)) from None
    with running:
        yield
    if running.returncode:
        raise _missing("clang-format", f"it ended with exit code {running.returncode}")


def _missing(name: str, why: str) -> SpecErrors:
    """The finding for a formatter that cannot be run."""
    help = f"install the version of {name} that sageLLM requires: reinstall sageLLM in this environment"
    return SpecErrors([Diagnostic("SAGE507", f"the formatter {name} must be runnable: {why}", None, help)])


def _format_python(folder: Path) -> None:
    ruff = _tool("ruff")
    line = f"line-length={LINE_LENGTH}"
    # Triton is named because a file in kernels/triton would count it as its own package.
    isort = 'lint.isort={known-first-party=["sageLLM"], known-third-party=["triton"]}'
    # fmt: sort and drop unused imports first, since that changes lines; then lay the lines out
    commands: list[list[str | Path]] = [
        [ruff, "check", *_FORMATTER_OPTIONS, "--config", line, "--config", isort, "--select=I,F401", "--fix"],
        [ruff, "format", *_FORMATTER_OPTIONS, "--config", line],
    ]
    for command in commands:
        try:
            done = subprocess.run(
                [*command, str(folder)], capture_output=True, text=True, env=dict(os.environ), check=False
            )
        except OSError as error:
            raise _missing("ruff", str(error)) from None
        if done.returncode:
            where = (done.stdout + done.stderr).replace(str(folder) + os.sep, "").strip()
            message = f"generated Python does not parse: {where[:400]}"
            raise SpecErrors([Diagnostic("SAGE503", message, help="report it with the specs")])
