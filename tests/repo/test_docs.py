"""Checks of docs/ and the READMEs: excerpts are lines of their files, commands, flags, paths and links exist.

A fence after `<!-- from PATH, ... -->` shows lines of those files, and one after `<!-- output of: sagellm ... -->`
lines of that command's output. A fence that begins with `$ sagellm ...` is a transcript: its commands run one after
the other in an empty folder with a link to examples/, unless `<!-- not run -->` precedes it. A line `...` (or `# ...`,
`// ...`) marks lines left out; times may differ.
"""

import ast
import importlib.util
import inspect
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

import sageLLM
from sageLLM.runtime.cli.main import app

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted(ROOT.glob("docs/*.md"))]
FOLDERS = ("benchmarks", "codegen", "docs", "examples", "generated", "runtime", "specs", "templates", "tests")
MARKER = re.compile(r"<!-- (from|output of:|not run) ?(.*) -->")
ELISION = re.compile(r"\s*(?:#|//)?\s*\.\.\.\s*")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@dataclass(frozen=True, slots=True)
class Fence:
    """A fenced block: its first line's number, the line before it, and its lines."""

    line: int
    before: str
    lines: tuple[str, ...]


def fences_of(text: str) -> Iterator[Fence]:
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.lstrip().startswith("```")]
    for start, end in zip(starts[::2], starts[1::2], strict=True):
        before = next((line for line in reversed(lines[:start]) if line.strip()), "")
        yield Fence(start + 2, before, tuple(lines[start + 1 : end]))


def prose_of(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


# Excerpts


def missing_lines(excerpt: Sequence[str], source: Sequence[str]) -> list[str]:
    """The first stretch of the excerpt that is not in the source, in order and at any depth of indentation."""
    position, stretch = 0, list[str]()
    for line in [*excerpt, "..."]:
        if not ELISION.fullmatch(line):
            stretch.append(line)
        elif stretch:
            found = find(stretch, source, position)
            if found is None:
                return stretch
            position, stretch = found + len(stretch), []
    return []


def find(stretch: Sequence[str], source: Sequence[str], start: int) -> int | None:
    size, wanted = len(stretch), dedented(stretch)
    return next((i for i in range(start, len(source) - size + 1) if dedented(source[i : i + size]) == wanted), None)


def dedented(lines: Sequence[str]) -> list[str]:
    depth = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return [re.sub(r"(?<=\S) +", " ", re.sub(r"\d+\.\d+\b", "0.0", line[depth:].rstrip())) for line in lines]


def lines_of(paths: str) -> list[str]:
    """The lines of files of the repository, or of folders that a transcript of the page has generated."""
    found = [path if (path := ROOT / name).exists() else Path(name) for name in paths.split(", ")]
    return [line for path in found for line in path.read_text(encoding="utf-8").splitlines()]


def output_of(command: str) -> list[str]:
    program, *arguments = shlex.split(re.sub(r" +[|#] .*", "", command))
    assert program == "sagellm", f"expected a sagellm command, got {command!r}"
    return CliRunner().invoke(app, arguments).output.splitlines()


def excerpts_of(fence: Fence) -> Iterator[tuple[str, Sequence[str], list[str]]]:
    """The name of each source that the fence quotes, the quoted lines, and the lines of the source."""
    marker = MARKER.fullmatch(fence.before.strip())
    match marker.groups() if marker else None:
        case ("from", paths):
            yield paths, fence.lines, lines_of(paths)
        case ("output of:", command):
            yield command, fence.lines, output_of(command)
        case None if fence.lines and fence.lines[0].startswith("$ sagellm "):
            starts = [i for i, line in enumerate(fence.lines) if line.startswith("$ ")]
            for start, end in pairwise([*starts, len(fence.lines)]):
                command = fence.lines[start].removeprefix("$ ")
                if command.startswith("sagellm ") and "CHECKPOINT" not in command:
                    yield command, fence.lines[start + 1 : end], output_of(command)


@each_page
def test_excerpts_are_lines_of_their_source(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    wrong = []
    for fence in fences_of(page.read_text(encoding="utf-8")):
        for name, lines, source in excerpts_of(fence):
            if missing := missing_lines(lines, source):
                wrong.append(f"{page.name}:{fence.line}: not in {name}:\n" + "\n".join(missing))
    assert not wrong, "\n\n".join(wrong)


@each_page
def test_excerpts_of_files_are_marked(page: Path) -> None:
    """A fence after a sentence that ends with the name of a file has the marker that lets its text be checked."""
    text = page.read_text(encoding="utf-8")
    unmarked = [
        f"{page.name}:{fence.line}: {found[1]}"
        for fence in fences_of(text)
        if (found := re.search(r"`([\w./-]+/[\w.-]+\.\w+)`[^`]*:$", fence.before))
        and ((ROOT / found[1]).exists() or found[1].startswith(("my_generated/", "my_models/", "my_passes/")))
    ]
    assert not unmarked, "write <!-- from PATH --> before these fences:\n" + "\n".join(unmarked)


SOURCE = ["def f():", "    a = 1", "    b = 2", "", "    return a"]


@pytest.mark.parametrize(
    ("excerpt", "missing"),
    [
        (["a = 1", "b = 2"], []),
        (["def f():", "    # ...", "    return a"], []),
        (["def f():", "...", "    a = 1"], []),
        (["a = 1", "return a"], ["a = 1", "return a"]),
        (["return a", "...", "a = 1"], ["a = 1"]),
        (["    a = 1", "  b = 2"], ["    a = 1", "  b = 2"]),
        (["b = 3"], ["b = 3"]),
    ],
)
def test_what_an_excerpt_may_leave_out(excerpt: list[str], missing: list[str]) -> None:
    assert missing_lines(excerpt, SOURCE) == missing


# Python


def problems_of_python(code: str) -> list[str]:
    """Imports that fail, and keywords that a function or class of the package does not take."""
    tree = ast.parse(code)
    known = {name: getattr(sageLLM, name) for name in sageLLM.__all__}
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sageLLM"):
            module = importlib.import_module(node.module or "")
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            problems += [f"unknown names in {node.module}: {missing}" for _ in missing[:1]]
            known |= {alias.name: getattr(module, alias.name) for alias in node.names if alias.name not in missing}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            taken = inspect.signature(known[node.func.id]).parameters
            unknown = [keyword.arg for keyword in node.keywords if keyword.arg not in {None, *taken}]
            problems += [f"{node.func.id} does not take {unknown}" for _ in unknown[:1]]
    return problems


@each_page
def test_python_in_docs_uses_existing_names(page: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found = [problem for block in blocks for problem in problems_of_python(textwrap.dedent(block))]
    assert found == []


@pytest.mark.parametrize(
    "code",
    ["from sageLLM.runtime.core.ir.graph import Grph", "LLM('folder', kernel='cpu')", "SamplingParams(max_token=3)"],
)
def test_a_wrong_name_in_python_is_found(code: str) -> None:
    assert len(problems_of_python(code)) == 1


# Commands


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command in a fence or in inline code, without prompts and comments."""
    lines = [line for fence in fences_of(text) for line in fence.lines]
    for line in lines + re.findall(r"`([^`\n]+)`", prose_of(text)):
        if found := re.match(r"(?:\$ )?((?:sagellm|make|python) .*)", line.strip()):
            yield re.sub(r"\s#.*| [>|] .*", "", found[1]).split()


def problem_of(words: Sequence[str]) -> str | None:
    """The reason why a command cannot be run as written; None if it can."""
    program, *arguments = words
    match program:
        case "make":
            unknown = [word for word in arguments if "=" not in word and word not in make_targets()]
            return f"unknown make target: {unknown}" if unknown else None
        case "sagellm":
            return problem_of_sagellm(arguments)
    return problem_of_script(arguments)


def problem_of_sagellm(arguments: Sequence[str]) -> str | None:
    name, *rest = arguments
    if name.startswith("--") or not name.isalpha() or not name.islower():
        return None
    if name not in subcommands():
        return f"unknown subcommand {name}"
    unknown = [flag for flag in flags_of(rest) if flag not in subcommands()[name]]
    return f"unknown flags of sagellm {name}: {', '.join(unknown)}" if unknown else None


def problem_of_script(arguments: Sequence[str]) -> str | None:
    script = ROOT / arguments[0]
    if arguments[0].startswith("-"):
        return None
    if not script.is_file():
        return f"no file {arguments[0]}"
    unknown = [flag for flag in flags_of(arguments) if flag not in script.read_text(encoding="utf-8")]
    return f"unknown flags of {arguments[0]}: {', '.join(unknown)}" if unknown else None


def flags_of(words: Sequence[str]) -> list[str]:
    return [word.partition("=")[0].rstrip(".,;:") for word in words if word.startswith("--")]


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@cache
def subcommands() -> dict[str, set[str]]:
    """The flags of each subcommand."""
    group = typer.main.get_group(app)
    return {
        name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        | {"--help"}
        for name, command in group.commands.items()
    }


@each_page
def test_commands_and_flags_exist(page: Path) -> None:
    found = [(words, problem_of(words)) for words in commands_of(page.read_text(encoding="utf-8"))]
    assert [f"{' '.join(words)}: {problem}" for words, problem in found if problem] == []


def test_the_readme_names_commands() -> None:
    programs = {words[0] for words in commands_of((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert programs >= {"make", "sagellm"}


@pytest.mark.parametrize(
    "command",
    [
        "make tests",
        "sagellm explode x",
        "sagellm graph llama --levels block",
        "python benchmarks/none.py",
        "python benchmarks/run_all.py --nope",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    assert problem_of(command.split()) is not None


# Links and paths


def broken_links(page: Path) -> list[str]:
    text = prose_of(page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    broken = []
    for target in (target for target in targets if "://" not in target):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            broken.append(f"{page.name}: {target}")
    return broken


@each_page
def test_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_links_of_generated_pages_resolve() -> None:
    pages = [*ROOT.glob("generated/docs/**/*.md")]
    assert pages
    assert [link for page in pages for link in broken_links(page)] == []


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose_of(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_paths_exist(page: Path) -> None:
    """Paths from the top-level folders in the prose; `*` and capitals stand for part of a name."""
    text = prose_of(page.read_text(encoding="utf-8"))
    paths = set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w*]", text))
    assert sorted(path for path in paths if not [*ROOT.glob(re.sub(r"[A-Z]{4,}", "*", path))]) == []


# Pictures


@pytest.fixture(scope="module")
def make_images() -> Iterator[ModuleType]:
    sys.path.insert(0, str(IMAGES))
    try:
        spec = importlib.util.spec_from_file_location("make_images", IMAGES / "make_images.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(IMAGES))


def test_svg_files_are_those_that_the_scripts_make(make_images: ModuleType) -> None:
    stale = [path.name for path, text in make_images.svg_files().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run python docs/images/make_images.py"
