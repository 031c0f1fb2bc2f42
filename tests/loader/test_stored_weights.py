"""Checkpoints with other names than their layout, and tied weights that are stored, against transformers."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sageLLM import LLM, SamplingParams
from sageLLM.generated.builders import MODELS
from sageLLM.runtime.cli.lint import LintRequest, lint_checkpoint
from sageLLM.runtime.core.model.checkpoint import check_checkpoint
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.stored import is_bare, with_stored_names
from sageLLM.runtime.errors import CheckpointError

MakeCheckpoint = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
PROMPT = [5, 17, 100, 42, 7, 63, 9]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, prompt_logprobs=0, ignore_eos=True)


def edited(source: Path, folder: Path, edit: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A copy of a checkpoint with other tensors and config values."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    tensors = {name: tensor.contiguous() for name, tensor in edit(load_file(folder / "model.safetensors")).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def check_against_transformers(folder: Path) -> LLM:
    """Equal greedy tokens, and log-probabilities of the prompt within 1e-4. Returns the engine."""
    llm = LLM(folder, dtype="float32", skip_tokenizer=True)
    output = llm.generate(PROMPT, GREEDY)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        logprobs = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
        ids = list(PROMPT)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert list(output.outputs[0].token_ids) == ids[len(PROMPT) :]
    assert output.prompt_logprobs is not None
    for i, found in enumerate(output.prompt_logprobs[1:]):
        assert found is not None
        assert abs(found[PROMPT[i + 1]].logprob - float(logprobs[i, PROMPT[i + 1]])) < 1e-4
    return llm


# tied weights


def head_like(tensors: Tensors, scale: float) -> torch.Tensor:
    embed = next(tensor for name, tensor in tensors.items() if re.search(r"(word_embeddings|embed_tokens|wte)\.", name))
    return torch.randn(embed.shape, generator=torch.Generator().manual_seed(3)) * scale


@pytest.mark.parametrize("family", ["Llama", "GPT2", "OPT", "Bloom", "Gemma2"])
def test_a_head_with_its_own_values_is_not_tied(family: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(family, tie_word_embeddings=True)
    folder = edited(source, tmp_path / "model", lambda t: {**t, "lm_head.weight": head_like(t, 0.2)})
    llm = check_against_transformers(folder)
    assert llm.model.ties == {}


def test_an_equal_head_shares_its_memory(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("Llama", tie_word_embeddings=True)
    folder = edited(
        source, tmp_path / "model", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()}
    )
    llm = LLM(folder, skip_tokenizer=True)
    assert llm.model.ties == {"lm_head": "embed"}
    assert llm.model.num_parameters == LLM(source, skip_tokenizer=True).model.num_parameters


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["whole", "bare"])
def test_a_head_alone_fills_both(prefix: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    def only_head(tensors: Tensors) -> Tensors:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        return {re.sub(r"^model\.", prefix, name): tensor for name, tensor in tensors.items()}

    folder = edited(make_checkpoint("Qwen2", tie_word_embeddings=True), tmp_path / "model", only_head)
    llm = check_against_transformers(folder)
    assert llm.model.ties == {"lm_head": "embed"}
    assert lint_checkpoint(LintRequest("model", folder, None, "1", (), False)) == 0


def test_a_head_of_another_shape_is_reported(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("Llama", tie_word_embeddings=True)
    folder = edited(source, tmp_path / "model", lambda t: {**t, "lm_head.weight": torch.ones(7, 64)})
    with pytest.raises(
        CheckpointError, match=r"tensor 'lm_head\.weight': expected \[199, 64\] for lm_head, got \[7, 64\]"
    ):
        LLM(folder, skip_tokenizer=True)


# names


@pytest.mark.parametrize("layout", [one for one in MODELS.values() if one.generates], ids=lambda one: one.name)
def test_every_decoder_reads_names_without_the_prefix(layout: Any) -> None:
    config = layout.read_config(HFConfig(layout.tiny))
    parts = [part for weight in layout.weights(config) if weight.tied_to is None for part in weight.parts]
    outer = layout.renamed.get(layout.prefix, (layout.prefix,))[0]
    shapes = {part.name.replace(layout.prefix, outer.replace(layout.prefix, "", 1), 1): part.shape for part in parts}
    assert layout.prefix
    assert is_bare(layout, shapes)
    assert check_checkpoint(with_stored_names(layout, shapes), config, shapes) == []
    assert not is_bare(layout, {part.name.replace(layout.prefix, outer, 1) for part in parts})


BARE = [("Bloom", "transformer."), ("Gemma3Text", "model."), ("Mixtral", "model.")]


@pytest.mark.parametrize(("family", "prefix"), BARE)
def test_names_without_the_prefix(family: str, prefix: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(family, tie_word_embeddings=False)
    folder = edited(source, tmp_path / "model", lambda t: {name.removeprefix(prefix): x for name, x in t.items()})
    check_against_transformers(folder)
    assert lint_checkpoint(LintRequest("model", folder, None, "1", (), False)) == 0


def test_messages_have_the_names_of_the_checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> Tensors:
        bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        del bare["layers.0.self_attn.q_proj.weight"]
        return bare

    folder = edited(make_checkpoint("Llama"), tmp_path / "model", edit)
    with pytest.raises(CheckpointError, match=r"missing tensor 'layers\.0\.self_attn\.q_proj\.weight'"):
        LLM(folder, skip_tokenizer=True)


def old_name(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize(
    ("family", "architecture", "prefix", "head"),
    [
        ("BertModel", "BertForMaskedLM", "bert.", "cls.predictions.bias"),
        ("BertModel", "BertForPreTraining", "bert.", "cls.seq_relationship.bias"),
        ("BertModel", "BertModel", "", None),
        ("RobertaModel", "RobertaForMaskedLM", "roberta.", "lm_head.bias"),
        ("ModernBertModel", "ModernBertForMaskedLM", "model.", "decoder.bias"),
    ],
)
def test_encoders_with_a_head_and_old_names(
    family: str, architecture: str, prefix: str, head: str | None, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    special = {"pad_token_id": 1} if "Roberta" in family else {}
    if "Modern" in family:
        special = {"cls_token_id": 2, "sep_token_id": 2, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    source = make_checkpoint(family, **special)

    def edit(tensors: Tensors) -> Tensors:
        renamed = {prefix + old_name(name): tensor for name, tensor in tensors.items()}
        return renamed if head is None else {**renamed, head: torch.ones(199)}

    folder = edited(source, tmp_path / "model", edit, architectures=[architecture])
    (output,) = LLM(folder, dtype="float32", skip_tokenizer=True).embed(PROMPT, pooling="mean")
    with torch.inference_mode():
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
        reference = model(torch.tensor([PROMPT])).last_hidden_state[0].mean(0)
    assert (output.embedding - reference).norm() <= 1e-5 * reference.norm()
    assert lint_checkpoint(LintRequest("model", folder, None, "1", (), False)) == 0


DEEPSEEK = {
    "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "kv_lora_rank": 20, "q_lora_rank": 24, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1, "num_hidden_layers": 2,
}  # fmt: skip


def with_mtp_layer(tensors: Tensors, last: int, index: int) -> Tensors:
    """The tensors with a copy of layer `last` as layer `index`, and the projection that only such a layer has."""
    old, new = f"model.layers.{last}.", f"model.layers.{index}."
    extra = {new + name.removeprefix(old): tensor.clone() for name, tensor in tensors.items() if name.startswith(old)}
    return {**tensors, **extra, f"{new}eh_proj.weight": torch.ones(64, 128)}


def test_the_layer_of_multi_token_prediction_is_ignored(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("DeepseekV3", **DEEPSEEK)
    folder = edited(source, tmp_path / "model", lambda t: with_mtp_layer(t, 1, 2), num_nextn_predict_layers=1)
    check_against_transformers(folder)
    both = edited(
        source, tmp_path / "two", lambda t: with_mtp_layer(with_mtp_layer(t, 1, 2), 1, 3), num_nextn_predict_layers=2
    )
    assert LLM(both, skip_tokenizer=True).model.config.L == 2
    # A further layer, and a layer of a config without this one, would change the answers.
    for number, (index, count) in enumerate(((3, 1), (2, 0))):
        other = tmp_path / str(number)
        edited(source, other, lambda t, i=index: with_mtp_layer(t, 1, i), num_nextn_predict_layers=count)  # type: ignore[misc]
        with pytest.raises(CheckpointError, match=rf"tensor 'model\.layers\.{index}\..*' .* is unused by the layout"):
            LLM(other, skip_tokenizer=True)
