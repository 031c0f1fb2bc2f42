"""GGUF files load directly: config, names, order of rows, tokenizer and chat template from their metadata."""

import json
import math
import os
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sageLLM import LLM, SamplingParams
from sageLLM.generated.formats import METHODS
from sageLLM.generated.formats.values import VALUES
from sageLLM.runtime.cli.lint import LintRequest, lint_checkpoint
from sageLLM.runtime.errors import CheckpointError, TokenizerError
from sageLLM.runtime.loader import gguf_tokenizer
from sageLLM.runtime.loader.gguf_architectures import config_of
from sageLLM.runtime.loader.gguf_checkpoint import open_gguf
from sageLLM.runtime.loader.gguf_folder import gguf_folder
from sageLLM.runtime.loader.gguf_reader import read_gguf_header
from sageLLM.runtime.loader.gguf_tokenizer import tokenizer_of
from sageLLM.runtime.text.tokenizer import Tokenizer
from tests.formats import gguf_files
from tests.formats.test_checkpoints import answers

MakeCheckpoint = Callable[..., Path]
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 64}
WORDS: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [chr(33 + i % 90) * (1 + i // 90) for i in range(199)],
    "tokenizer.ggml.merges": ["! !"],
    "tokenizer.ggml.eos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FORMATS = {"q_proj.weight": "q8_0", "up_proj.weight": "q4_0", "k_proj.weight": "q8_0", "lm_head.weight": "q8_0"}


FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    ("Llama", "llama", {"tie_word_embeddings": True}),
    ("Llama", "llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    ("Qwen3", "qwen3", {"head_dim": 32}),
    ("Qwen2", "qwen2", {}),
    (
        "Qwen3Moe",
        "qwen3moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    ("Qwen2Moe", "qwen2moe", {**EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}),
    ("Olmoe", "olmoe", EXPERTS),
    ("Gemma", "gemma", {"head_dim": 32}),
    ("Gemma2", "gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    ("Gemma3Text", "gemma3", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    ("Phi3", "phi3", {"pad_token_id": 0}),
    ("Starcoder2", "starcoder2", {}),
    ("Nemotron", "nemotron", {}),
    ("StableLm", "stablelm", {"use_parallel_residual": False}),
    ("Olmo2", "olmo2", {}),
    ("Glm4", "glm4", {"head_dim": 32, "pad_token_id": 0}),
    ("Granite", "granite", {"attention_multiplier": 0.25, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    ("SmolLM3", "smollm3", {"pad_token_id": 0}),
    ("SeedOss", "seed_oss", {"head_dim": 32}),
]
"""Classes of transformers, architectures, and sizes."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sageLLM.runtime.loader.gguf_folder.cache_folder", lambda: tmp_path / "cache")


@pytest.mark.parametrize(("family", "architecture", "config"), FAMILIES)
def test_the_answers_are_those_of_the_dequantised_checkpoint(
    family: str, architecture: str, config: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(family, **SMALL, **config)
    plain = gguf_files.convert(source, tmp_path / "m.gguf", architecture, FORMATS, **WORDS)
    found = answers(tmp_path / "m.gguf", dtype="float32")
    assert found == answers(plain, dtype="float32")


def test_blocks_of_256(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("Llama", **{**SMALL, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1})
    names = ("q_proj", "k_proj", "gate_proj", "up_proj", "embed_tokens")
    formats = {**dict.fromkeys((f"{name}.weight" for name in names), "q4_k"), "proj.weight": "q6_k"}
    plain = gguf_files.convert(source, tmp_path / "m.gguf", "llama", formats, **WORDS)
    assert answers(tmp_path / "m.gguf", dtype="float32") == answers(plain, dtype="float32")
    stats = LLM(str(tmp_path / "m.gguf"), skip_tokenizer=True, dtype="float32").weight_stats()
    assert {"int6 in groups of 16", "int4 in groups of 32"} <= {one.form for one in stats if one.reason is None}
    assert {one.reason for one in stats} == {None}  # q and k become codes of 6 bits, as those of v


def test_a_rank_has_the_share_of_the_dequantised_weights(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from sageLLM.runtime.loader.model import load_model
    from sageLLM.runtime.registry.plugins import load_registry

    plain = gguf_files.convert(make_checkpoint("Llama", **SMALL), tmp_path / "m.gguf", "llama", FORMATS, **WORDS)
    options: dict[str, Any] = {"dtype": "float32", "device": torch.device("cpu"), "max_model_len": None, "tp": 2}
    folder = gguf_folder(tmp_path / "m.gguf")
    for rank in range(2):
        one, other = (load_model(path, load_registry(), rank=rank, **options).weights for path in (folder, plain))
        assert all(torch.equal(one[name], other[name]) for name in one)  # type: ignore[arg-type]


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "ids.gguf"
    gguf_files.convert(TINY, path, "llama", {}, **{"tokenizer.ggml.model": "none"})
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    found = [LLM(model, skip_tokenizer=True).generate([[1, 2, 3]], greedy) for model in (str(path), str(TINY))]
    assert found[0][0].outputs[0].token_ids == found[1][0].outputs[0].token_ids
    with pytest.raises(TokenizerError, match=r"expected tokenizer.json in .*, or pass prompts as token ids"):
        LLM(str(path))


TINY = Path(__file__).parents[2] / "examples" / "tiny_python_model"


def test_the_tokenizer_of_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its merges and tokens as metadata; the file's pattern is added to those known."""
    content = json.loads((TINY / "tokenizer.json").read_text())
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    monkeypatch.setitem(gguf_tokenizer.SPLITS, "tiny", pattern)  # type: ignore[arg-type]
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tiny",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    gguf_files.convert(TINY, tmp_path / "tiny.gguf", "llama", {}, **metadata)
    llm = LLM(str(tmp_path / "tiny.gguf"))
    assert llm.tokenizer is not None
    own, other = llm.tokenizer, Tokenizer.from_folder(TINY)
    for text in ("def main(self):\n    return 1", "élan  vital <|endoftext|> 12", ""):
        assert own.encode(text) == other.encode(text)
        assert own.decode(own.encode(text)) == other.decode(other.encode(text))
    assert own.chat_templates["default"] == "{{ messages[0].content }}" and own.eos_token_ids == {0}
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    texts = [one.generate(["def main("], greedy)[0].outputs[0].text for one in (llm, LLM(str(TINY)))]
    assert texts[0] == texts[1]


def test_pieces_with_scores(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """SentencePiece: the pair with the best result is merged first; unknown characters become bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        "a",
        "b",
        "c",
        "ab",
        "bc",
        "\u2581a",
    ]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 7,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    source = make_checkpoint("Llama", **SMALL, vocab_size=len(pieces))
    gguf_files.convert(source, tmp_path / "m.gguf", "llama", {}, **metadata)
    tokenizer = Tokenizer.from_folder(gguf_folder(tmp_path / "m.gguf"))
    ids = {piece: i for i, piece in enumerate(pieces)}
    assert tokenizer.encode("abc") == [1, *(ids[piece] for piece in ("\u2581a", "bc"))]
    assert tokenizer.encode("\u00e9") == [1, *(ids[piece] for piece in ("\u2581", "<0xC3>", "<0xA9>"))]
    assert tokenizer.decode(tokenizer.encode("abc a\u00e9")) == "abc a\u00e9"


def edited(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert content.count(old) >= 1
    path.write_bytes(content.replace(old, new, 1))
    return path


@pytest.fixture
def file(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    gguf_files.convert(make_checkpoint("Llama", **SMALL), tmp_path / "m.gguf", "llama", FORMATS, **WORDS)
    return tmp_path / "m.gguf"


Q = gguf_files.text("blk.0.attn_q.weight") + struct.pack("<IQQ", 2, 64, 64)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (b"GGUF", b"GGML", "must begin with GGUF; pass a GGUF file, or a checkpoint folder"),
        (b"GGUF\3", b"GGUF\1", "byte 8 of the header: version 1 is not supported; supported are 2 and 3"),
        (b"llama.block_count", b"llama.block_counT", "'llama.block_count' must be a number, got null"),
        (gguf_files.typed("llama"), gguf_files.typed("mamba"), "must be one of llama, qwen2, qwen2moe, qwen3,"),
        (Q + struct.pack("<I", 8), Q + struct.pack("<I", 16), "'blk.0.attn_q.weight' has the type 16, which is not"),
        (Q, Q[:-16] + struct.pack("<QQ", 60, 64), "the rows of 'blk.0.attn_q.weight' must be multiples of 32 elements"),
        (Q, Q[:-16] + struct.pack("<QQ", 64, 2**40), "'blk.0.attn_q.weight' ends at byte"),
        (Q, Q[:-16] + struct.pack("<QQ", 64, 2**60), "'blk.0.attn_q.weight' of the shape [1152921504606846976, 64] is"),
        (gguf_files.typed("gpt2"), gguf_files.typed("bert"), "'tokenizer.ggml.model' must be gpt2 or llama, got 'ber"),
    ],
)  # fmt: skip
def test_a_damaged_file(old: bytes, new: bytes, error: str, file: Path) -> None:
    with pytest.raises((CheckpointError, TokenizerError)) as caught:
        LLM(edited(file, old, new))
    assert (error in str(caught.value) and str(caught.value).startswith(str(file))) or "cache" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_off(file: Path) -> None:
    content = file.read_bytes()
    for length in (3, 24, 400, 3000, len(content) - 100):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"must begin with GGUF|cut off|outside of the file|ends at byte"):
            LLM(file, skip_tokenizer=True)


def test_a_file_is_not_mapped_and_may_be_cut_off_while_it_is_read(file: Path) -> None:
    """Mapped pages would be memory of the process, and end it by SIGBUS when they are gone."""
    checkpoint = open_gguf(file, METHODS["gguf"], VALUES["gguf"])
    names = list(checkpoint)
    assert all(checkpoint.read(name).numel() for name in names)
    assert str(file) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    os.truncate(file, file.stat().st_size // 8)
    with pytest.raises(CheckpointError, match=r"was cut off while it was read; download it again$"):
        for name in names:
            checkpoint.read(name)


@pytest.mark.parametrize("base", ["x", -5.0, 0.0, math.inf, math.nan, [1.0]])
def test_the_base_of_the_rotation_is_a_positive_number(base: object, file: Path) -> None:
    header = read_gguf_header(file)
    changed = replace(header, metadata={**header.metadata, "llama.rope.freq_base": base})
    for factors in (None, [1.0, 2.0]):
        with pytest.raises(CheckpointError, match=r"'llama.rope.freq_base' must be a positive number, got "):
            config_of(changed, factors, "float32")


def test_lint(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lint_checkpoint(LintRequest("model", file, None, None, (), False)) == 0
    assert "exactly those of the layout" in capsys.readouterr().out


def test_mutated_headers_are_read_or_refused(file: Path) -> None:
    """Any bytes of the header: a clear error, or a header; nothing else, and no large allocation.

    `SAGELLM_GGUF_SCALE=40` tries 10^4 of them (`make fuzz-gguf`).
    """
    content = bytearray(file.read_bytes())
    end = content.index(b"blk.1.")
    random = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(250 * int(os.environ.get("SAGELLM_GGUF_SCALE", "1"))):
        found = bytearray(content)
        for at in random.integers(0, end, random.integers(1, 4)):
            found[at] = random.integers(0, 256)
        file.write_bytes(found)
        try:
            header = read_gguf_header(file)
            open_gguf(file, METHODS["gguf"], VALUES["gguf"])
            config_of(header, None, "float32")
            tokenizer_of(header)
            outcomes["read"] += 1
        except (CheckpointError, TokenizerError) as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10, outcomes


def header_with_lists(path: Path, kind: int, width: int, counts: list[int]) -> Path:
    """A file whose metadata is lists of zeros, which take no space on the disk."""
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, len(counts)))
        for i, count in enumerate(counts):
            file.write(struct.pack("<Q2sIIQ", 2, f"k{i}".encode(), 9, kind, count))
            file.seek(width * count, 1)
        file.truncate(file.tell())
    return path


@pytest.mark.parametrize(("kind", "width"), [(0, 1), (12, 8), (8, 8)], ids=["bytes", "doubles", "strings"])
def test_long_lists_are_refused_before_they_take_memory(kind: int, width: int, tmp_path: Path) -> None:
    path = header_with_lists(tmp_path / "long.gguf", kind, width, [1000, 2**23])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="lists must have at most 4194304 elements, with 'k1' they have more"):
            read_gguf_header(path)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
    assert len(read_gguf_header(header_with_lists(tmp_path / "short.gguf", kind, width, [1000])).metadata["k0"]) == 1000
