"""Defaults that a checkpoint folder sets: sampling parameters, element type, length and prompts of embeddings."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.cli.lint import LintRequest, lint_checkpoint
from sageLLM.runtime.errors import CheckpointError, PromptError

MakeCheckpoint = Callable[..., Path]
ONE_LAYER = {"num_hidden_layers": 1, "max_position_embeddings": 64}


@pytest.fixture
def folder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_checkpoint("Llama", **ONE_LAYER), tmp_path / "model"))


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


# sampling parameters


def defaults(folder: Path, **arguments: Any) -> SamplingParams:
    return LLM(folder, skip_tokenizer=True, **arguments).get_default_sampling_params()


GENERATION = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1, "max_new_tokens": 5,
              "min_p": None, "do_sample": True, "eos_token_id": [1, 2], "transformers_version": "5.0"}  # fmt: skip


def test_sampling_defaults_are_those_of_generation_config(folder: Path, tmp_path: Path) -> None:
    write(folder / "generation_config.json", GENERATION)
    expected = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1, max_tokens=5)
    assert defaults(folder) == expected
    assert defaults(folder, generation_config="vllm") == SamplingParams()
    write(tmp_path / "other" / "generation_config.json", {"temperature": 0})
    assert defaults(folder, generation_config=tmp_path / "other") == SamplingParams(temperature=0)
    (folder / "generation_config.json").unlink()
    assert defaults(folder) == SamplingParams()


def test_only_calls_without_params_have_the_defaults(folder: Path) -> None:
    write(folder / "generation_config.json", {"temperature": 0.0, "max_new_tokens": 3})
    llm = LLM(folder, skip_tokenizer=True)
    greedy = SamplingParams(temperature=0.0, max_tokens=3)
    assert llm.generate([5, 6])[0].outputs[0].token_ids == llm.generate([5, 6], greedy)[0].outputs[0].token_ids
    assert [len(o.outputs[0].token_ids) for o in llm.stream([5, 6])][-1] == 3
    long = llm.generate([5, 6], SamplingParams(max_tokens=9, ignore_eos=True))[0]
    assert len(long.outputs[0].token_ids) == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": -1}, "temperature must be a number from 0 to 100, got -1; to ignore the file, pass"),
        ({"top_p": "high"}, "top_p must be a number .*, got 'high'; to ignore the file, pass generation_config='vllm'"),
    ],
)
def test_a_damaged_generation_config(content: object, message: str, folder: Path) -> None:
    write(folder / "generation_config.json", content)
    with pytest.raises(CheckpointError, match=message):
        defaults(folder)
    assert defaults(folder, generation_config="vllm") == SamplingParams()


@pytest.mark.parametrize("source", ["nowhere", 5])
def test_an_unknown_source_of_sampling_defaults(source: Any, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config must be auto, vllm, or a folder"):
        defaults(folder, generation_config=source)


# element type


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_config_without_dtype_has_that_of_the_weights(dtype: torch.dtype, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    write(path, {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")})
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()  # a minority
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert LLM(folder, skip_tokenizer=True).model.dtype == dtype
    assert LLM(folder, skip_tokenizer=True, dtype="float32").model.dtype == torch.float32


def test_float64_weights_are_computed_with_in_float32(folder: Path) -> None:
    path = folder / "config.json"
    write(path, {**json.loads(path.read_text()), "dtype": None})
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert LLM(folder, skip_tokenizer=True).model.dtype == torch.float32


# files


@pytest.mark.parametrize(
    "index", ['{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}', "{", "[]"]
)
def test_a_stale_index_next_to_the_single_file(index: str, folder: Path) -> None:
    """As after `save_pretrained` into the folder of a sharded checkpoint; transformers prefers the single file too."""
    (folder / "model.safetensors.index.json").write_text(index)
    LLM(folder, skip_tokenizer=True)
    assert lint_checkpoint(LintRequest("model", folder, None, "1", (), False)) == 0


def test_the_single_file_may_be_one_of_several_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    head = {"lm_head.weight": tensors.pop("lm_head.weight")}
    save_file(head, folder / "head.safetensors", metadata={"format": "pt"})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "model.safetensors") | dict.fromkeys(head, "head.safetensors")
    write(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    LLM(folder, skip_tokenizer=True)


# embeddings

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", ":", "some", "text", "more", "words"]
TEXT = "some more words text text text some words more text"


@pytest.fixture
def encoder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A folder of sentence-transformers with mean pooling."""
    folder = Path(shutil.copytree(make_checkpoint("BertModel"), tmp_path / "encoder"))
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.save(str(folder / "tokenizer.json"))
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in (("", "Transformer"), ("1_Pooling", "Pooling"))
    ]
    write(folder / "modules.json", modules)
    write(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    return folder


def ids_of(folder: Path, text: str, **options: Any) -> list[int]:
    return list(LLM(folder, dtype="float32").embed(text, **options)[0].prompt_token_ids)


@pytest.mark.parametrize("length", [2, 5, 11, 12, 200])
def test_texts_are_cut_to_max_seq_length(length: int, encoder: Path) -> None:
    write(encoder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    reference = tokenizers.Tokenizer.from_file(str(encoder / "tokenizer.json"))
    reference.enable_truncation(length)
    assert ids_of(encoder, TEXT) == reference.encode(TEXT).ids


def test_other_lengths(encoder: Path) -> None:
    """Without max_seq_length the tokenizer's length decides, or the model's, of 256 tokens; ids are never cut."""
    long = TEXT * 100
    assert len(ids_of(encoder, long)) == 256
    write(encoder / "tokenizer_config.json", {"model_max_length": 9})
    assert len(ids_of(encoder, long)) == 9
    write(encoder / "tokenizer_config.json", {"model_max_length": int(1e30)})
    assert len(ids_of(encoder, long)) == 256
    assert len(LLM(encoder, max_model_len=30).embed(long)[0].prompt_token_ids) == 30
    write(encoder / "sentence_bert_config.json", {"max_seq_length": 4})
    llm = LLM(encoder)
    assert llm.embed([[5] * 20])[0].prompt_token_ids == (5,) * 20
    (encoder / "modules.json").unlink()
    with pytest.raises(PromptError, match=r"^the prompt must have at most 256 tokens"):
        LLM(encoder).embed(long)


def test_prompts_of_the_folder(encoder: Path) -> None:
    write(encoder / "config_sentence_transformers.json", {"prompts": {"query": "query: ", "document": ""}})
    plain = [2, 6, 7, 3]
    asked = [2, 4, 5, 6, 7, 3]
    assert ids_of(encoder, "some text") == plain
    assert ids_of(encoder, "  some text ", prompt_name="query") == asked
    prompts = {"query": "query: ", "document": ""}
    write(encoder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "query"})
    llm = LLM(encoder)
    (output,) = llm.embed("some text")
    assert (output.prompt, list(output.prompt_token_ids)) == ("some text", asked)
    for name in ("document", ""):
        assert list(llm.embed("some text", prompt_name=name)[0].prompt_token_ids) == plain
    assert list(llm.embed([[6, 7]])[0].prompt_token_ids) == [6, 7]
    with pytest.raises(PromptError) as caught:
        llm.embed("some text", prompt_name="passage")
    message = "prompt_name must be one of the folder's prompts ('query', 'document'), got 'passage'"
    assert str(caught.value) == message


def test_lower_case(encoder: Path) -> None:
    assert ids_of(encoder, "Some TEXT") == [2, 1, 1, 3]
    write(encoder / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": True})
    assert ids_of(encoder, "Some TEXT") == [2, 6, 7, 3]


def test_a_pooling_without_the_prompt_is_refused(encoder: Path) -> None:
    write(encoder / "config_sentence_transformers.json", {"prompts": {"query": "query: "}})
    write(encoder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True, "include_prompt": False})
    assert ids_of(encoder, "some text") == [2, 6, 7, 3]
    with pytest.raises(PromptError, match=r"^the prompt 'query' cannot be used, as the folder's pooling excludes"):
        ids_of(encoder, "some text", prompt_name="query")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "sentence_bert_config.json",
            {"max_seq_length": 0},
            "must be an integer of at least 1, got 0",
        ),
        ("sentence_bert_config.json", [], "must hold a JSON object, got a list"),
        ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "'prompts' must be an object of texts"),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": "a"},
            r"one of its prompts \(it has none\)",
        ),
    ],
)
def test_damaged_settings(name: str, content: object, message: str, encoder: Path) -> None:
    write(encoder / name, content)
    with pytest.raises(CheckpointError, match=message):
        LLM(encoder)
