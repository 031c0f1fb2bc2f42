"""Mutated specs: whatever a file holds, the generator answers with diagnostics and nothing else.

`make fuzz-specs` makes 50 times as many of them.
"""

import os
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest

from sageLLM.codegen import driver
from sageLLM.codegen.diagnostics import Sink, SpecErrors, render
from sageLLM.codegen.link.interfaces import Interfaces
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.codegen.link.models import link_models
from sageLLM.codegen.link.ops import link_ops
from sageLLM.codegen.link.passes import link_passes
from sageLLM.codegen.load import RawSpecs, SpecFile, assemble, check_file, source_names
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.schema.models import ModelFile
from sageLLM.codegen.schema.ops import OpsFile
from sageLLM.codegen.source import load_document, parse_document

NUM_MUTANTS = 1_000 * int(os.environ.get("SAGELLM_SPEC_SCALE", "1"))
NUM_BATCHES = 4

PIECE = re.compile(r"[\w.]+|[^\w.]")
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
MEMO = LinkMemo()
"""Layouts that were linked with the same ops and the same text."""
LAYOUTS = ("llama", "bert", "bloom", "deepseek_v3", "gemma3", "gpt_oss", "qwen2_moe", "smollm3")
"""Between them they use every construct of the layout language."""


def mutate(text: str, rng: random.Random) -> str:
    """One to three edits at places where tokens begin: insert, replace, delete, swap or copy."""
    for _ in range(rng.randint(1, 3)):
        pieces = PIECE.findall(text)
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


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_a_mutated_spec_gives_only_diagnostics(batch: int) -> None:
    rng = random.Random(batch)
    found = 0
    for _ in range(NUM_MUTANTS // NUM_BATCHES):
        victim = rng.choice(FILES)
        text = mutate(victim.doc.text, rng)
        try:
            compile_with(victim, text, rng)
        except SpecErrors as errors:
            found += 1
            assert errors.diagnostics
            lines = [*text.split("\n"), ""]
            for diagnostic in errors.diagnostics:
                render(diagnostic, lambda file, line, lines=lines: lines[line - 1] if line <= len(lines) else None)
        except Exception as error:
            raise AssertionError(f"{victim.doc.file} as below made {error!r}\n{text}") from error
    assert found > NUM_MUTANTS // NUM_BATCHES // 4, "the mutations are too mild to prove anything"


def compile_with(victim: SpecFile, text: str, rng: random.Random) -> None:
    """Load, link and check the package's specs with one file's text replaced; of what did not change, a sample.

    Sound entries are linked elsewhere. What a mutant may break is its own entries, and those that build on them.
    """
    sink = Sink()
    mutant = check_file(parse_document(text, display=victim.doc.file), sink)
    files = [mutant if file is victim else file for file in FILES]
    raw = assemble([file for file in files if file], frozenset(), sink)
    sink.raise_if_any()
    ops = ops_with(victim, raw, rng, sink)
    sink.raise_if_any()
    link_models(raw, ops, sink, layouts_with(victim, raw, rng), MEMO.link_model)
    link_passes(raw, Interfaces(ops), sink)
    sink.raise_if_any()


def ops_with(victim: SpecFile, raw: RawSpecs, rng: random.Random, sink: Sink) -> Mapping[str, OpDef]:
    """The ops of the victim and those that fuse them; the sound ones as they are. Of a vocabulary, one file's ops."""
    if victim.doc.file.startswith(("specs/models/", "specs/passes/", "specs/hardware/")):
        return sound_ops()
    sources = [file.doc.file for file in FILES if isinstance(file.spec, OpsFile)]
    source = victim.doc.file if victim.doc.file in sources else rng.choice(sources)
    own = {name for name, entry in raw.ops.items() if entry.doc.file == source}
    lines = {name: " ".join(entry.spec.fuses or ()) for name, entry in raw.ops.items()}
    fused = {name for name, text in lines.items() if any(f"{op}(" in text for op in own)}
    called = {op for name in own | fused for op in raw.ops if f"{op}(" in lines[name]}
    changed = {name: entry for name, entry in raw.ops.items() if name in own | fused | called}
    sound = {name: op for name, op in sound_ops().items() if name in raw.ops}
    return {**sound, **link_ops(replace(raw, ops=changed), sink)}


def layouts_with(victim: SpecFile, raw: RawSpecs, rng: random.Random) -> list[str]:
    """The victim's own layout and one made of it; of any other file, one of `LAYOUTS`."""
    own = [name for name, entry in raw.models.items() if entry.doc.file == victim.doc.file]
    heirs = [name for name, entry in raw.models.items() if not set(own).isdisjoint(source_names(entry.spec))]
    if not isinstance(victim.spec, ModelFile):
        return [rng.choice(LAYOUTS)]
    return own + ([rng.choice(heirs)] if heirs else [])


@cache
def sound_ops() -> Mapping[str, OpDef]:
    """The package's ops, linked once."""
    sink = Sink()
    linked = link_ops(assemble(FILES, frozenset(), sink), sink)
    sink.raise_if_any()
    return linked
