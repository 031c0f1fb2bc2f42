"""Embeddings against transformers: hidden states, pooled outputs and poolings agree within 1e-5 of their size."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.cli.engine_options import EngineOptions
from sageLLM.runtime.cli.lint import LintRequest, lint_checkpoint
from sageLLM.runtime.cli.run import EmbedRequest, embed_prompts
from sageLLM.runtime.errors import PromptError, SageError
from sageLLM.runtime.loader.sentence_transformers import model_folder, read_recipe

TOLERANCE = 1e-5
MakeCheckpoint = Callable[..., Path]

SPECIAL_TOKENS = {"cls_token_id": 2, "sep_token_id": 2, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {}),
    "roberta": ("RobertaModel", {"pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaModel", {"pad_token_id": 2, "max_position_embeddings": 80}),
    "camembert": ("CamembertModel", {"pad_token_id": 1}),
    "bert with relu": ("BertModel", {"hidden_act": "relu"}),
    "bert with tanh gelu": ("BertModel", {"hidden_act": "gelu_new"}),
    "modernbert": ("ModernBertModel", {"local_attention": 16, "num_hidden_layers": 5, **SPECIAL_TOKENS}),
    "modernbert with biases": (
        "ModernBertModel",
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "local_attention": 6, **SPECIAL_TOKENS},
    ),
    "bert with one type": ("BertModel", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
}


def random_prompts(lengths: tuple[int, ...], vocab_size: int = 199) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = random_prompts((1, 5, 16, 17, 33, 70))


@lru_cache(maxsize=2)
def transformers_model(folder: Path) -> Any:
    """The model of a folder, loaded once for the prompts of a test."""
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)


@torch.inference_mode()
def expected(folder: Path, prompt: list[int], **inputs: Tensor) -> Any:
    return transformers_model(folder)(torch.tensor([prompt]), **inputs)


def load(folder: Path, **settings: Any) -> LLM:
    return LLM(folder, dtype="float32", skip_tokenizer=True, **settings)


def vectors(llm: LLM, prompts: list[list[int]], **settings: Any) -> list[Tensor]:
    return [output.embedding for output in llm.embed(prompts, **settings)]


def assert_close(found: Tensor, reference: Tensor) -> None:
    assert found.shape == reference.shape
    assert (found - reference).norm() <= TOLERANCE * reference.norm()


@pytest.mark.parametrize("case", ENCODERS)
def test_hidden_states_and_pooled_output_are_those_of_transformers(case: str, make_checkpoint: MakeCheckpoint) -> None:
    family, config = ENCODERS[case]
    folder = make_checkpoint(family, **config)
    llm = load(folder)
    tokens, pooled = vectors(llm, PROMPTS, pooling="none"), vectors(llm, PROMPTS)
    for prompt, rows, row in zip(PROMPTS, tokens, pooled, strict=True):
        reference = expected(folder, prompt)
        assert_close(rows, reference.last_hidden_state[0])
        assert_close(
            row, reference.pooler_output[0] if "pooler_output" in reference else reference.last_hidden_state[0].mean(0)
        )


def test_every_pooling_is_made_of_the_hidden_states(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("BertModel")
    llm = load(folder)
    states = [expected(folder, prompt).last_hidden_state[0] for prompt in PROMPTS]
    reference = {
        "first": [rows[0] for rows in states],
        "last": [rows[-1] for rows in states],
        "mean": [rows.mean(0) for rows in states],
    }
    for pooling, rows in reference.items():
        for found, row in zip(vectors(llm, PROMPTS, pooling=pooling), rows, strict=True):
            assert_close(found, row)
        for found, row in zip(vectors(llm, PROMPTS, pooling=pooling, normalize=True), rows, strict=True):
            assert_close(found, torch.nn.functional.normalize(row, dim=0))


def test_token_types_are_looked_up(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("BertModel")
    kinds = [[0] * (len(prompt) // 2) + [1] * (len(prompt) - len(prompt) // 2) for prompt in PROMPTS]
    llm = load(folder)
    found = vectors(llm, PROMPTS, pooling="mean", type_ids=kinds)
    for row, prompt, kind in zip(found, PROMPTS, kinds, strict=True):
        reference = expected(folder, prompt, token_type_ids=torch.tensor([kind]))
        assert_close(row, reference.last_hidden_state[0].mean(0))
    for wrong, message in (
        ([[0]] * len(PROMPTS), "expected one type id per token, got 1 for 5 tokens"),
        ([[2] * len(p) for p in PROMPTS], "type ids must be from 0 to 1 for this model, got 2"),
        ([[-1] * len(p) for p in PROMPTS], "type ids must be integers of at least 0, got -1"),
        ([[0]], "expected one list of type ids per prompt, got 1 lists for 6 prompts"),
    ):
        with pytest.raises(PromptError) as caught:
            llm.embed(PROMPTS, type_ids=wrong)
        assert str(caught.value) == message


@pytest.mark.parametrize("family", ["BertModel", "Qwen3"])
def test_the_other_prompts_of_a_step_do_not_matter(family: str, make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(family)
    whole = load(folder)
    small = load(folder, scheduler=PDSchedulerConfig(max_prefill_tokens=20), block_size=4)
    together, apart = vectors(whole, PROMPTS, pooling="mean"), vectors(small, PROMPTS, pooling="mean")
    alone = [vectors(small, [prompt], pooling="mean")[0] for prompt in PROMPTS]
    for one, two, three in zip(together, apart, alone, strict=True):
        assert_close(two, one)
        assert_close(three, one)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPT2", "Bloom", "GPTNeoX", "Gemma2", "Olmo2", "Mixtral"])
def test_a_decoder_embeds_by_its_last_hidden_state(family: str, make_checkpoint: MakeCheckpoint) -> None:
    """As Qwen3-Embedding does: the state of the last token after the final norm, of length 1."""
    folder = make_checkpoint(family)
    llm = load(folder)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    before = llm.generate(PROMPTS, params)
    found = vectors(llm, PROMPTS, normalize=True)
    for row, prompt in zip(found, PROMPTS, strict=True):
        reference = expected(folder, prompt).last_hidden_state[0, -1]
        assert_close(row, torch.nn.functional.normalize(reference, dim=0))
    assert [o.outputs for o in llm.generate(PROMPTS, params)] == [o.outputs for o in before]


def test_a_sentence_transformers_folder_sets_the_pooling(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("BertModel")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    names = ["Transformer", "Pooling", "Normalize"]
    modules = [{"path": f"{i}_{n}", "type": f"sentence_transformers.models.{n}"} for i, n in enumerate(names)]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    config = tmp_path / "1_Pooling" / "config.json"
    states = expected(source, PROMPTS[3]).last_hidden_state[0]
    for content, row in (
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, states.mean(0)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, states[0]),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 64}, states[-1]),
    ):
        config.write_text(json.dumps(content))
        (found,) = vectors(load(tmp_path), [PROMPTS[3]])
        assert_close(found, torch.nn.functional.normalize(row, dim=0))
    config.write_text(json.dumps({"pooling_mode": "max"}))
    with pytest.raises(SageError) as caught:
        load(tmp_path).embed([PROMPTS[3]])
    assert str(caught.value) == (
        f"{config} requests a pooling that is not supported; choose one with pooling=: model, first, last, mean, none"
    )
    (found,) = vectors(load(tmp_path), [PROMPTS[3]], pooling="first", normalize=False)
    assert_close(found, states[0])


def test_a_sentence_transformers_folder_may_have_the_model_in_a_subfolder(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Folders of early versions of the library have `0_Transformer` or `0_BERT`."""
    source = make_checkpoint("BertModel")
    names = ["Transformer", "Pooling"]
    modules = [{"path": f"{i}_{n}", "type": f"sentence_transformers.models.{n}"} for i, n in enumerate(names)]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    shutil.copytree(source, tmp_path / "0_Transformer")
    (tmp_path / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16}))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    (found,) = vectors(load(tmp_path), [PROMPTS[3]])
    assert_close(found, expected(source, PROMPTS[3]).last_hidden_state[0].mean(0))
    assert model_folder(tmp_path) == tmp_path / "0_Transformer"
    assert read_recipe(tmp_path).max_seq_length == 16
    assert model_folder(source) == source
    assert lint_checkpoint(LintRequest("model", tmp_path, None, "1", (), False)) == 0


def test_generating_with_an_encoder_is_an_error(make_checkpoint: MakeCheckpoint) -> None:
    llm = load(make_checkpoint("BertModel"))
    with pytest.raises(SageError) as caught:
        llm.generate([PROMPTS[0]])
    assert (
        str(caught.value)
        == "bert computes embeddings, not text; call embed() instead of generate(), stream() or chat()"
    )


UNKNOWN_POOLING = "pooling must be one of model, first, last, mean, none for bert, got 'max'"


def test_prompts_that_cannot_be_embedded_are_errors(make_checkpoint: MakeCheckpoint) -> None:
    encoder, decoder = load(make_checkpoint("BertModel")), load(make_checkpoint("Llama"))
    assert len(vectors(encoder, [[5] * 256])) == 1, "all positions can be used, since nothing is generated"
    for call, message in (
        (lambda: encoder.embed([[5] * 257]), "the prompt must have at most 256 tokens for this model, got 257"),
        (lambda: encoder.embed([[]]), "the prompt must have at least one token"),
        (lambda: encoder.embed([[199]]), "prompt token 0 must be from 0 to 198 for this model, got 199"),
        (
            lambda: encoder.embed([[5]], pooling="max"),
            "pooling must be one of model, first, last, mean, none for bert, got 'max'",
        ),
        (
            lambda: decoder.embed([[5]], pooling="model"),
            "pooling must be one of first, last, mean, none for llama, got 'model'",
        ),
        (
            lambda: decoder.embed([[5]], type_ids=[[0]]),
            "type_ids must be None for llama, which does not use token types",
        ),
    ):
        with pytest.raises(SageError) as caught:
            call()
        assert str(caught.value) == message


@pytest.mark.parametrize("family", ["LlamaModel", "Qwen2Model", "Qwen3Model"])
def test_a_bare_decoder_embeds_and_does_not_generate(family: str, make_checkpoint: MakeCheckpoint) -> None:
    """A checkpoint of the model without lm_head, as embedding models of decoders are often published."""
    folder = make_checkpoint(family)
    llm = load(folder)
    assert llm.model.absent == ("lm_head",)
    for row, prompt in zip(vectors(llm, PROMPTS), PROMPTS, strict=True):
        assert_close(row, expected(folder, prompt).last_hidden_state[0, -1])
    with pytest.raises(SageError, match=r"^\w+ without lm_head computes embeddings, not text; call embed"):
        llm.generate([PROMPTS[0]])


def test_an_encoder_may_lack_its_pooler_but_not_half_of_it(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("BertModel")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors["pooler.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SageError, match=r"missing tensor 'pooler\.dense\.weight'"):
        load(tmp_path)
    del tensors["pooler.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    llm = load(tmp_path)
    assert llm.model.absent == ("pooler", "pooler_bias")
    (found,) = vectors(llm, [PROMPTS[4]])
    assert_close(found, expected(source, PROMPTS[4]).last_hidden_state[0].mean(0))
    with pytest.raises(SageError) as caught:
        llm.embed([PROMPTS[4]], pooling="model")
    assert str(caught.value) == "pooling must be one of first, last, mean, none for bert, got 'model'"


def write_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer that puts a text between [CLS] and [SEP], as BERT's does."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "text", "another", "##s"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"sep_token": "[SEP]", "cls_token": "[CLS]"}))


def test_the_command_prints_one_line_per_text(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint("BertModel")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_tokenizer(tmp_path)
    texts = ["a text", "another text texts"]
    request = EmbedRequest(
        model=tmp_path,
        prompts=texts,
        pooling="mean",
        normalize=True,
        prompt_name=None,
        engine=EngineOptions(dtype="float32", kernels="reference"),
    )
    assert embed_prompts(request) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == texts
    for line, ids in zip(lines, ([2, 4, 5, 3], [2, 6, 5, 5, 7, 3]), strict=True):
        row = expected(source, ids).last_hidden_state[0].mean(0)
        assert_close(torch.tensor(line["embedding"]), torch.nn.functional.normalize(row, dim=0))
    assert embed_prompts(replace(request, pooling="max")) == 1
    assert capsys.readouterr().err.endswith(
        "pooling must be one of model, first, last, mean, none for bert, got 'max'\n"
    )
