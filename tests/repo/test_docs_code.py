"""Checks of Python and commands in docs/ and the READMEs: names, keywords, targets, subcommands and flags exist."""

import ast
import importlib
import inspect
import re
import subprocess
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import typer
from pages import ROOT, each_page, fences_of, prose_of

import sageLLM
from sageLLM.runtime.cli.bench_commands import bench_app
from sageLLM.runtime.cli.main import app


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


# Names in the docs that are not of this repository, or only examples of a form.
FOREIGN_NAMES = {"GGML_NATIVE", "boundary_check", "num_x", "q_TNH", "x_len"}


@cache
def words_of_the_code() -> frozenset[str]:
    """Every word of the tracked code, and of the names of its files."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    suffixes = (".py", ".h", ".cpp", ".yaml", ".jinja", ".toml", ".json", ".css", ".js", "Makefile")
    files = [name for name in names if name.endswith(suffixes) and not name.startswith("tests/codegen/cases/")]
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in files)
    return frozenset(re.findall(r"\w+", text)) | frozenset(re.split(r"[/.\n]", "\n".join(names)))


@each_page
def test_names_in_docs_exist(page: Path) -> None:
    """Identifiers in inline code occur in the code: a renamed function is renamed in the docs too."""
    spans = re.findall(r"`([A-Za-z_][\w.]*\w)(?:\(\))?`", prose_of(page.read_text(encoding="utf-8")))
    names = {name for span in spans for name in span.split(".") if re.search(r"_|[a-z][A-Z]", name)}
    assert sorted(names - words_of_the_code() - FOREIGN_NAMES) == []


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command in a fence or in inline code, without prompts and comments."""
    lines = [line for fence in fences_of(text) for line in fence.lines]
    for line in lines + re.findall(r"`([^`\n]+)`", prose_of(text)):
        if found := re.match(r"(?:\$ )?((?:sagellm|make|python) .*)", line.strip()):
            yield re.findall(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""", re.sub(r"\s#.*| [>|] .*", "", found[1]))


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
    if name == "bench" and rest and rest[0].isalpha():
        name, *rest = f"bench {rest[0]}", *rest[1:]
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
    commands = dict(typer.main.get_group(app).commands)
    commands |= {f"bench {name}": command for name, command in typer.main.get_group(bench_app).commands.items()}
    return {
        name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        | {"--help"}
        for name, command in commands.items()
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
        "sagellm bench none",
        "sagellm bench latency --nope",
        "python benchmarks/none.py",
        "python benchmarks/run_all.py --nope",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    assert problem_of(command.split()) is not None
