"""Hostile tokenizers are refused at load with a message, in bounded time; so are texts that would take too long."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sageLLM.runtime.errors import TokenizerError
from sageLLM.runtime.text import tokenizer_probe
from sageLLM.runtime.text.tokenizer import Tokenizer
from sageLLM.runtime.text.tokenizer_probe import caller_error

BPE = {
    "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
    "fuse_unk": False, "byte_fallback": False, "vocab": {"a": 0, "b": 1, "aa": 2, "!": 3}, "merges": ["a a"],
}  # fmt: skip
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REMEDY = "; use another tokenizer.json, or pass prompts as token ids with skip_tokenizer=True"


def replace(text: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(key: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", key: list(parts)}


def write(folder: Path, **parts: Any) -> Path:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    content = {"version": "1.0", "added_tokens": [], **empty, "model": BPE, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def refusal(folder: Path) -> str:
    start = time.monotonic()
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(folder)
    assert time.monotonic() - start < 30
    return str(caught.value).removeprefix(f"{folder / 'tokenizer.json'} ").removesuffix(REMEDY)


CRASH = "crashes the tokenizer library, or requires too much memory or time for short texts"
BOMB = [replace("a", "a" * 100)] * 4
COPIES = {
    "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10_000, "pair": [],
    "special_tokens": {},
}  # fmt: skip
HOSTILE = {
    "an expansion bomb in the normalizer": ({"normalizer": sequence("normalizers", *BOMB)}, CRASH),
    "a small expansion": ({"normalizer": replace("a", "b" * 100)}, "must make at most 64 tokens of a character"),
    "an expansion of a rare text": ({"normalizer": replace("xyzzy", "b" * 1000)}, "must make at most 64 tokens"),
    "an expansion bomb in the decoder": (
        {"decoder": sequence("decoders", *BOMB)},
        "must decode a token to at most 64 times its characters",
    ),
    "an expansion in the decoder": (
        {"decoder": sequence("decoders", *BOMB[:2])},
        "must decode a token to at most 64 times its characters",
    ),
    "a template of many copies": ({"post_processor": COPIES}, "must make at most 64 tokens of a character"),
    "exponential back-tracking": ({"pre_tokenizer": split("(a+)+$")}, "makes the tokenizer library panic"),
    "cubic back-tracking": ({"pre_tokenizer": split("b*b*b*b*[!?]{2}")}, CRASH),
    "a damaged table": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////////"}}, CRASH),
    "a long token": (
        {"model": BPE | {"vocab": {"a": 0, "b" * 20_000: 1}, "merges": []}},
        "must have tokens of at most 16384 characters, got 20000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_refused(name: str, tmp_path: Path) -> None:
    parts, message = HOSTILE[name]
    assert refusal(write(tmp_path, **parts)).startswith(message)


def test_a_tokenizer_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(tokenizer_probe, "_WORKER", worker)
    monkeypatch.setattr(tokenizer_probe, "PROBE_SECONDS", 1.0)
    assert refusal(write(tmp_path)) == "takes more than 1 s for short texts"


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_tokenizer_that_is_not_a_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if kind == "fifo":
        subprocess.run(["mkfifo", str(path)], check=True)
    else:
        path.symlink_to("/dev/zero")
    assert refusal(tmp_path) == f"must be a regular file, got a {kind.upper() if kind == 'fifo' else kind}"


@pytest.mark.parametrize("parts", [{}, {"pre_tokenizer": split(LLAMA_3)}, {"normalizer": {"type": "NFKC"}}])
def test_published_kinds_keep_the_full_text_length(parts: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path, **parts))
    assert tokenizer.max_text_len > 2**20
    assert tokenizer.encode("aab") == [2, 1]


def test_quadratic_work_limits_the_length_of_texts(tmp_path: Path) -> None:
    """`a*[!?]{2}` searches the rest of the text again from each character."""
    tokenizer = Tokenizer.from_folder(write(tmp_path, pre_tokenizer=split("a*[!?]{2}")))
    assert 8192 < tokenizer.max_text_len < 2**20
    with pytest.raises(TokenizerError, match="the text must have at most"):
        tokenizer.encode("a" * (tokenizer.max_text_len + 1))


def test_a_text_that_the_model_cannot_hold_is_refused_before_it_is_tokenised(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path), max_tokens=10)
    assert len(tokenizer.encode("a" * 640)) == 320
    with pytest.raises(TokenizerError) as caught:
        tokenizer.encode("a" * 641)
    assert str(caught.value) == "the text must have at most 640 characters, got 641"


def test_a_vocabulary_without_an_unknown_token_refuses_texts_only(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "[UNK]"}
    tokenizer = Tokenizer.from_folder(write(tmp_path, model=model))
    assert tokenizer.encode("b") == [0]
    with pytest.raises(TokenizerError, match=r"^the text cannot be tokenised: WordLevel error"):
        tokenizer.encode("z")


def test_panics_become_errors_and_interrupts_pass() -> None:
    panic = type("PanicException", (BaseException,), {})("index out of bounds")
    assert str(caller_error(panic, "label")) == "label: the tokenizer library panics (index out of bounds)"
    for error in (KeyboardInterrupt(), SystemExit(), TokenizerError("x"), TypeError("x")):
        assert caller_error(error, "label") is error


def test_the_probe_sees_no_secrets_and_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    worker = tmp_path / "worker.py"
    worker.write_text("import os; print('{\"refused\": \"%s\"}' % ('SECRET' in os.environ))")
    monkeypatch.setattr(tokenizer_probe, "_WORKER", worker)
    assert refusal(write(tmp_path)) == "False"
    probe = tokenizer_probe.TokenizerProbe(tmp_path / "tokenizer.json")
    probe.close()
    assert probe._process.returncode is not None


def test_the_worker_imports_only_the_library() -> None:
    code = f"import runpy, sys; runpy.run_path({str(tokenizer_probe._WORKER)!r}); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
