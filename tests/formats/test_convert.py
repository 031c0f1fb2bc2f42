"""`sagellm convert`: GGUF files and checkpoint folders with the same answers, for each architecture and format."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.cli.main import app
from sageLLM.runtime.convert.convert import convert
from sageLLM.runtime.convert.to_gguf import gguf_formats
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.gguf_folder import gguf_folder
from sageLLM.runtime.loader.gguf_reader import read_gguf_header
from sageLLM.runtime.loader.open_checkpoint import open_checkpoint
from sageLLM.runtime.quantize.checkpoint import quantize_checkpoint
from sageLLM.runtime.quantize.scheme import Scheme
from sageLLM.runtime.registry.plugins import load_registry
from sageLLM.runtime.text.tokenizer import Tokenizer
from tests.formats.test_checkpoints import answers
from tests.formats.test_gguf import FAMILIES, SMALL

MakeCheckpoint = Callable[..., Path]
REGISTRY = load_registry()
TINY = Path(__file__).parents[2] / "examples" / "tiny_python_model"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sageLLM.runtime.loader.gguf_folder.cache_folder", lambda: tmp_path / "cache")


@pytest.mark.parametrize(("family", "architecture", "config"), FAMILIES)
def test_each_architecture_there_and_back(
    family: str, architecture: str, config: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Norms with 1 added are rounded to float32 there; all other values are equal."""
    source = make_checkpoint(family, **SMALL, **config)
    convert(source, tmp_path / "m.gguf", REGISTRY, "float32")
    header = read_gguf_header(tmp_path / "m.gguf")
    assert header.metadata["general.architecture"] == architecture
    convert(tmp_path / "m.gguf", tmp_path / "back", REGISTRY)
    stored, back = open_checkpoint(source, REGISTRY), open_checkpoint(tmp_path / "back", REGISTRY)
    names = [name for name in stored if name != "lm_head.weight" or name in back]
    assert set(back) == set(names)
    for name in names:
        bound = 3e-7 if name.endswith("norm.weight") else 0
        assert torch.allclose(back.read(name), stored.read(name), rtol=0, atol=bound), name
    expected = answers(source, dtype="float32")
    for path in (tmp_path / "m.gguf", tmp_path / "back"):
        for (tokens, logprobs), (own_tokens, own) in zip(answers(path, dtype="float32"), expected, strict=True):
            assert tokens == own_tokens and np.allclose(logprobs, own, atol=1e-4)


@pytest.mark.parametrize("form", gguf_formats(REGISTRY.methods["gguf"]))
def test_each_format_there_and_back(form: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The folder has the values of the file; these are near those of the source."""
    sizes = {**SMALL, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    source = make_checkpoint("Llama", **sizes, tie_word_embeddings=False, dtype="bfloat16")
    convert(source, tmp_path / "m.gguf", REGISTRY, form)
    convert(tmp_path / "m.gguf", tmp_path / "back", REGISTRY, "float32")
    assert answers(tmp_path / "m.gguf", dtype="float32") == answers(tmp_path / "back", dtype="float32")
    found = open_checkpoint(tmp_path / "back", REGISTRY)
    for name, weight in load_file(source / "model.safetensors").items():
        error = (found.read(name) - weight.float()).norm() / weight.float().norm()
        assert error <= BOUNDS[form], name


def test_recipes_by_name_and_layer(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Names in capitals, types of tensors, smaller blocks for incomplete rows, and a tied embedding as the output."""
    sizes = {**SMALL, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 8}
    numbers = {"q4_k": 12, "q5_k": 13, "q6_k": 14, "q5_0": 6}
    source = make_checkpoint("Llama", **sizes, tie_word_embeddings=False)
    assert convert(source, tmp_path / "m.gguf", REGISTRY, "Q4_K_M") == {"q4_k": 1 + 5 * 8 + 8, "q6_k": 1 + 2 * 4}
    header = read_gguf_header(tmp_path / "m.gguf")
    types = {name: one.type for name, one in header.tensors.items()}
    assert [types[f"blk.{i}.ffn_down.weight"] for i in range(8)] == [14, 12, 12, 14, 12, 12, 14, 14]
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == numbers["q4_k"]
    assert types["output.weight"] == numbers["q6_k"]
    assert (header.metadata["general.file_type"], header.metadata["general.quantization_version"]) == (15, 2)
    tied = make_checkpoint("Llama", **{**sizes, "hidden_size": 192}, tie_word_embeddings=True)
    counts = convert(tied, tmp_path / "tied.gguf", REGISTRY, "q4_k_m")
    assert counts == {"q5_0": 4 * 8 + 4, "q4_k": 8 + 4, "q8_0": 1 + 4, "q6_k": 4}
    types = {name: one.type for name, one in read_gguf_header(tmp_path / "tied.gguf").tensors.items()}
    assert "output.weight" not in types and types["token_embd.weight"] == 8
    assert types["blk.1.ffn_up.weight"] == numbers["q5_0"] and types["blk.1.ffn_down.weight"] == numbers["q4_k"]
    convert(tmp_path / "m.gguf", tmp_path / "back", REGISTRY, "float32")
    assert answers(tmp_path / "m.gguf", dtype="float32") == answers(tmp_path / "back", dtype="float32")


BOUNDS = {"float32": 0, "float16": 2**-12, "bfloat16": 0, "q8_0": 0.006, "q4_0": 0.085, "q4_1": 0.074, "q5_0": 0.043,
          "q5_1": 0.036, "q2_k": 0.285, "q3_k": 0.152, "q4_k": 0.075, "q5_k": 0.038, "q6_k": 0.0185}  # fmt: skip
"""Relative errors of normal values, in the Euclidean norm."""


def test_the_command_with_the_bundled_model(tmp_path: Path) -> None:
    """Its tokenizer splits texts unlike any of llama.cpp's, so that the file has tokenizer.json as text."""
    file, back = tmp_path / "tiny.gguf", tmp_path / "back"
    for arguments in (["convert", str(TINY), str(file)], ["convert", str(file), str(back)]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0 and " tensors in bfloat16, written in" in done.output, done.output
    assert read_gguf_header(file).metadata["tokenizer.ggml.model"] == "none"
    greedy = SamplingParams(max_tokens=16, temperature=0.0)
    texts = [LLM(path).generate(["def main("], greedy)[0].outputs[0].text for path in (TINY, file, back)]
    assert texts[0] == texts[1] == texts[2] != ""
    own, other = load_file(TINY / "model.safetensors"), load_file(back / "model.safetensors")
    assert all(torch.equal(own[name], other[name]) for name in own)
    config = json.loads((back / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("llama", "bfloat16")
    done = CliRunner().invoke(app, ["convert", str(TINY), str(file)])
    assert done.exit_code == 1 and "already exists; choose another path" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "cache", "tiny.gguf"]


def tokenizer_json(pre_tokenizers: list[dict[str, Any]], **model: Any) -> dict[str, Any]:
    letters = {chr(33 + i): i for i in range(94)}
    merges = [["h", "e"], ["l", "l"], ["he", "ll"]]
    words = letters | {"".join(pair): 94 + i for i, pair in enumerate(merges)}
    added = [{"id": 97, "content": "<end>", "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True}]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers}, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": words, "merges": merges, **model},
    }  # fmt: skip


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def with_tokenizer(folder: Path, target: Path, content: dict[str, Any]) -> Path:
    shutil.copytree(folder, target)
    (target / "tokenizer.json").write_text(json.dumps(content))
    settings = {"eos_token": "<end>", "bos_token": "<end>", "chat_template": "{{ messages[0].content }}"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


def test_a_tokenizer_in_keys_of_llama_cpp(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The keys are those of llama.cpp's converter; rows of the embedding without a token are unused ones."""
    digits = {"type": "Digits", "individual_digits": True}
    source = with_tokenizer(make_checkpoint("Llama", **SMALL), tmp_path / "source", tokenizer_json([digits, BYTES]))
    convert(source, tmp_path / "m.gguf", REGISTRY)
    found = read_gguf_header(tmp_path / "m.gguf").metadata
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    assert found["tokenizer.ggml.merges"] == ["h e", "l l", "he ll"]
    assert found["tokenizer.ggml.tokens"][96:99] == ["hell", "<end>", "[PAD98]"]
    assert found["tokenizer.ggml.token_type"][96:99] == [1, 3, 5]
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.add_bos_token"]) == (97, False)
    convert(tmp_path / "m.gguf", tmp_path / "back", REGISTRY)
    own, other = (Tokenizer.from_folder(folder) for folder in (source, tmp_path / "back"))
    assert own.encode("hell12") == other.encode("hell12") == [96, 16, 17]
    assert other.eos_token_ids == own.eos_token_ids and other.chat_templates == own.chat_templates


def test_a_tokenizer_of_pieces(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Scores follow the order of merges, and texts begin with the token that the post-processor adds."""
    content = tokenizer_json([], byte_fallback=True, fuse_unk=True)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]}
    content["pre_tokenizer"] = None
    special = {"<end>": {"id": "<end>", "ids": [97], "tokens": ["<end>"]}}
    first, text = {"SpecialToken": {"id": "<end>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [first, text], "pair": [first, text], "special_tokens": special
    }  # fmt: skip
    content["model"]["vocab"]["\u2581"] = 98
    source = with_tokenizer(make_checkpoint("Llama", **SMALL), tmp_path / "source", content)
    convert(source, tmp_path / "m.gguf", REGISTRY)
    found = read_gguf_header(tmp_path / "m.gguf").metadata
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.scores"][94:97] == [0.0, -1.0, -2.0]
    convert(tmp_path / "m.gguf", tmp_path / "back", REGISTRY)
    own, other = (Tokenizer.from_folder(folder) for folder in (source, tmp_path / "back"))
    assert own.encode("hell he") == other.encode("hell he") == [97, 98, 96, 98, 94]


def with_end(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**content, "added_tokens": [{**content["added_tokens"][0], **changes}]}


def with_word(word: str, **changes: Any) -> dict[str, Any]:
    """A tokenizer with one more word, before its end."""
    words = tokenizer_json([])["model"]["vocab"] | {word: 97}
    return with_end(tokenizer_json([BYTES], vocab=words), id=98, **changes)


def unigram() -> dict[str, Any]:
    vocabulary = [["<unk>", 0.0], *([letter, -3.0] for letter in "\u2581hel"), ["\u2581he", -1.0]]
    content = with_end(tokenizer_json([]), id=len(vocabulary))
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": False}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    return {**content, "model": model, "pre_tokenizer": metaspace, "decoder": metaspace}


def pieces(**changes: Any) -> dict[str, Any]:
    """Pieces of texts with a space before them; `changes` are those of the end."""
    content = tokenizer_json([], byte_fallback=True, fuse_unk=True)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]}
    content["model"]["vocab"]["\u2581"] = 97
    return with_end({**content, "pre_tokenizer": None}, id=98, **changes)


def with_template(*tokens: str) -> dict[str, Any]:
    """Texts have the tokens around them."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [text if one == "A" else {"SpecialToken": {"id": one, "type_id": 0}} for one in tokens]
    special = {"<end>": {"id": "<end>", "ids": [97], "tokens": ["<end>"]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    return {**tokenizer_json([BYTES]), "post_processor": template}


@pytest.mark.parametrize(
    "content",
    [
        unigram(),
        {key: value for key, value in unigram().items() if key != "added_tokens"},
        with_template("A", "<end>"),
        with_template("<end>", "A", "<end>"),
        with_template("<end>", "A"),
        with_word("\u0120"),
        with_word("\u0120", lstrip=True),
        with_word("\u0120", rstrip=True),
        with_word("\u0120", single_word=True),
        with_word("xyz"),
        pieces(),
        pieces(normalized=True),
        with_word("xyz", normalized=True),
        tokenizer_json([BYTES], ignore_merges=True),
        tokenizer_json([BYTES], dropout=1.0),
    ],
)
def test_texts_have_the_same_tokens(content: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = with_tokenizer(make_checkpoint("Llama", **SMALL), tmp_path / "source", content)
    convert(source, tmp_path / "m.gguf", REGISTRY)
    own, other = (Tokenizer.from_folder(folder) for folder in (source, gguf_folder(tmp_path / "m.gguf")))
    end = "<end>" if "added_tokens" in content else "l"
    for text in ("hell he", f"he {end} hell", f"he{end}he", "", "xyz"):
        assert other.encode(text) == own.encode(text), text
    assert "added_tokens" not in content or other.eos_token_ids == own.eos_token_ids


def test_a_token_after_a_text_has_a_key(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Embedding models read the state at such a token."""
    source = with_tokenizer(make_checkpoint("Llama", **SMALL), tmp_path / "source", with_template("A", "<end>"))
    convert(source, tmp_path / "m.gguf", REGISTRY)
    found = read_gguf_header(tmp_path / "m.gguf").metadata
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (False, True)
    assert Tokenizer.from_folder(gguf_folder(tmp_path / "m.gguf")).encode("he") == [94, 97]


@pytest.mark.parametrize("form", ["int4-g32", "fp8-block", "awq-g32"])
def test_a_quantised_folder_becomes_floats(form: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("Llama", **SMALL)
    quantize_checkpoint(source, tmp_path / "codes", Scheme.parse(form, REGISTRY.methods), REGISTRY)
    convert(tmp_path / "codes", tmp_path / "m.gguf", REGISTRY, "float32")
    convert(tmp_path / "codes", tmp_path / "floats", REGISTRY, "float32")
    codes, floats = (open_checkpoint(tmp_path / name, REGISTRY) for name in ("codes", "floats"))
    file = open_checkpoint(gguf_folder(tmp_path / "m.gguf"), REGISTRY)
    for name in codes:
        expected = codes.read(name, dtype=torch.float32)
        assert torch.equal(floats.read(name), expected) and torch.equal(file.read(name), expected)
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())


def test_a_head_unlike_the_embeddings_is_kept(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """It is not tied then, whatever the config says; an equal one is written once."""
    source = make_checkpoint("Llama", **SMALL, tie_word_embeddings=True)
    weights = {name: one for name, one in load_file(source / "model.safetensors").items() if name != "lm_head.weight"}
    for name, factor in (("equal", 1.0), ("other", -1.0)):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        head = factor * weights["model.embed_tokens.weight"]
        save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
        convert(folder, tmp_path / f"{name}.gguf", REGISTRY, "float32")
        assert ("output.weight" in read_gguf_header(tmp_path / f"{name}.gguf").tensors) == (name == "other")
        found, own = answers(tmp_path / f"{name}.gguf", dtype="float32"), answers(folder, dtype="float32")
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in own]


def test_rotations(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    llama3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}
    for i, rope in enumerate((llama3, yarn, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0})):
        source = make_checkpoint("Llama", **SMALL, rope_parameters=rope)
        convert(source, tmp_path / f"{i}.gguf", REGISTRY, "float32")
        assert json.loads((gguf_folder(tmp_path / f"{i}.gguf") / "config.json").read_text())["rope_parameters"] == rope


def test_what_cannot_be_converted(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("Llama", **SMALL)
    with pytest.raises(CheckpointError, match="--format of a GGUF file must be one of float32, float16, bfloat16, q8_"):
        convert(source, tmp_path / "m.gguf", REGISTRY, "q9")
    with pytest.raises(CheckpointError, match="--format of a folder must be one of float32, float16, bfloat16, got"):
        convert(source, tmp_path / "m", REGISTRY, "q8_0")
    with pytest.raises(CheckpointError, match=r"must have one of the architectures .*, got 'GPT2LMHeadModel'"):
        convert(make_checkpoint("GPT2"), tmp_path / "m.gguf", REGISTRY)
    dynamic = make_checkpoint(
        "Llama", **SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    with pytest.raises(CheckpointError, match="GGUF files of llama cannot describe this model, with 'rope  factor = 2"):
        convert(dynamic, tmp_path / "m.gguf", REGISTRY)
    large = tmp_path / "large"
    shutil.copytree(source, large)
    tensors = load_file(source / "model.safetensors")
    save_file({name: 1e9 * one for name, one in tensors.items()}, large / "model.safetensors", {"format": "pt"})
    for form, refused in (("float16", "float16"), ("q8_0", "q8_0"), ("q4_0", "q8_0"), ("q4_k_m", "q8_0")):
        with pytest.raises(CheckpointError, match=f"has values that {refused} does not have; use another --format"):
            convert(large, tmp_path / "m.gguf", REGISTRY, form)
    with pytest.raises(CheckpointError, match=r"has values that float16 does not have; use another --format"):
        convert(large, tmp_path / "m", REGISTRY, "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]
