"""Mutated specs: whatever a file holds, the generator answers with diagnostics and nothing else."""

import random
from collections.abc import Iterator

import pytest

from sageLLM.codegen import driver
from sageLLM.codegen.diagnostics import Sink, SpecErrors, render
from sageLLM.codegen.load import SpecFile, assemble, check_file
from sageLLM.codegen.source import load_document, parse_document

NUM_MUTANTS = 5_000
NUM_BATCHES = 20

TOKENS = [
    *("null", "true", "off", "~", "{}", "[]", "''", '""', "-1", "0", "1e999", "9" * 40, "2026-13-45", "010", ".nan"),
    *("!!int x", "!!python/object:os.system {}", "&a b", "*a", "<<: *a", "|", ">", "---", "...", "? ", ": ", "- "),
    *("[" * 70, "{a: " * 70, "\t", "\x00", "\u202e", "\ud7ff", "\u2028", "\\N{DASH}", "{{7*7}}", "{% for %}", '"""'),
    *("__import__('os').system('x')", "x.__class__", "lambda: 0", "[i for i in x]", "f32(" * 80, "x[0]", "x := 1"),
    *("x ** 99999999999", "9 ** 9 ** 9 ** 9", "1 / 0", "T % 0", "E[..., ..., H]", "E[T, T//0]", "E[]", "E[T", "i99[T]"),
    *("${HOME}", "../../etc/passwd", "/etc/passwd", "templates/x", "class", "None", "self", "import", "E", "T", "gu"),
    *("y = y", "y = f32(y)\ny = y", "q, k = q", "x = add(x)", "x = nothing(x, y)", "a b c", "= 1", "x =", "(x", "'"),
]


def package_files() -> list[SpecFile]:
    paths = sorted(driver.BASE_SPECS.rglob("*.yaml"))
    docs = [load_document(p, display=f"specs/{p.relative_to(driver.BASE_SPECS).as_posix()}") for p in paths]
    files = [check_file(doc, Sink()) for doc in docs]
    return [file for file in files if file]


FILES = package_files()


def mutate(text: str, rng: random.Random) -> str:
    """One to three edits at places where tokens begin: insert, replace, delete, swap or copy."""
    for _ in range(rng.randint(1, 3)):
        pieces = [piece for piece in _pieces(text) if piece]
        i, j = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        match rng.randrange(6):
            case 0:
                pieces[i] = rng.choice(TOKENS)
            case 1:
                pieces.insert(i, rng.choice(TOKENS))
            case 2:
                del pieces[i]
            case 3:
                pieces[i], pieces[j] = pieces[j], pieces[i]
            case 4:
                pieces[i] = pieces[j]
            case 5:
                cut = rng.randrange(len(pieces[i]) + 1)
                pieces[i] = pieces[i][:cut] + chr(rng.choice([0, 9, 10, 39, 123, 0x202E, 0xFFFD])) + pieces[i][cut:]
        text = "".join(pieces) or " "
    return text


def _pieces(text: str) -> Iterator[str]:
    word = ""
    for char in text:
        if char.isalnum() or char in "_.":
            word += char
        else:
            yield word
            yield char
            word = ""
    yield word


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_a_mutated_spec_gives_only_diagnostics(batch: int) -> None:
    rng = random.Random(batch)
    found = 0
    for _ in range(NUM_MUTANTS // NUM_BATCHES):
        victim = rng.choice(FILES)
        text = mutate(victim.doc.text, rng)
        try:
            compile_with(victim, text)
        except SpecErrors as errors:
            found += 1
            assert errors.diagnostics
            lines = [*text.split("\n"), ""]
            for diagnostic in errors.diagnostics:
                render(diagnostic, lambda file, line, lines=lines: lines[line - 1] if line <= len(lines) else None)
        except Exception as error:
            raise AssertionError(f"{victim.doc.file} as below made {error!r}\n{text}") from error
    assert found > NUM_MUTANTS // NUM_BATCHES // 4, "the mutations are too mild to prove anything"


def compile_with(victim: SpecFile, text: str) -> None:
    """Load, link and check the package's specs with one file's text replaced."""
    sink = Sink()
    mutant = check_file(parse_document(text, display=victim.doc.file), sink)
    files = [mutant if file is victim else file for file in FILES]
    raw = assemble([file for file in files if file], frozenset(), sink)
    sink.raise_if_any()
    driver.link(raw)
