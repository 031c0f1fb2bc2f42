"""The text models of models with images against the multimodal classes of transformers, in float32."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sageLLM import LLM
from sageLLM.codegen import driver
from sageLLM.runtime.cli.lint import LintRequest, lint_checkpoint
from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.errors import CheckpointError

from .test_oracle import FIXED_MODES, PROMPTS, MakeCheckpoint, assert_same, check_all_modes, serve
from .test_oracle_experts import LLAMA4

VISION = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
LATENT = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
IMAGES = {**VISION, "image_size": 28, "patch_size": 14}
GEMMA3 = {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 24, "sliding_window_pattern": 3}
PIXTRAL = {**IMAGES, "model_type": "pixtral", "head_dim": 16}
WIDE = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 32}
DEEP = {**WIDE, "hidden_size": 32, "out_hidden_size": 64, "deepstack_visual_indexes": [0]}


def mrope(base: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base, "mrope_section": [2, 3, 3], **more}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "kimi_k25": ("Kimi_K25", {"text_config": LATENT, "vision_config": VISION, "tie_word_embeddings": False}),
    "kimi_k25 tied": ("Kimi_K25", {"text_config": LATENT, "vision_config": VISION}),
    "gemma3_mm": ("Gemma3", {"text_config": GEMMA3, "vision_config": IMAGES}),
    "gemma3_mm untied": ("Gemma3", {"text_config": GEMMA3, "vision_config": IMAGES, "tie_word_embeddings": False}),
    "gemma3_mm with scaled positions": (
        "Gemma3",
        {
            "text_config": GEMMA3
            | {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                }
            },
            "vision_config": IMAGES,
        },
    ),
    "mistral3": (
        "Mistral3",
        {"text_config": {"model_type": "mistral", "head_dim": 24, "sliding_window": None}, "vision_config": PIXTRAL}
        | {"tie_word_embeddings": False},
    ),
    "mistral3 tied, with a window": (
        "Mistral3",
        {"text_config": {"model_type": "mistral", "sliding_window": 9}, "vision_config": PIXTRAL},
    ),
    "ministral3_mm": (
        "Mistral3",
        {"text_config": {"model_type": "ministral3", "head_dim": 24}, "vision_config": PIXTRAL}
        | {"tie_word_embeddings": False},
    ),
    "llama4_mm": (
        "Llama4",
        {
            "text_config": {**LLAMA4, "no_rope_layer_interval": 2, "attention_chunk_size": 13, "no_rope_layers": []},
            "vision_config": {**IMAGES, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        },
    ),
    "qwen2_vl": ("Qwen2VL", {"text_config": mrope(1e6), "vision_config": {**WIDE, "embed_dim": 32}}),
    "qwen2_vl 2.5 with windows, tied": (
        "Qwen2_5_VL",
        {
            "text_config": mrope(5e4) | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            "vision_config": {**WIDE, "out_hidden_size": 64},
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_vl 2.5 with yarn": (
        "Qwen2_5_VL",
        {
            "text_config": mrope(1e4, rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
            "vision_config": {**WIDE, "out_hidden_size": 64},
        },
    ),
    "qwen3_vl": ("Qwen3VL", {"text_config": mrope(5e6) | {"head_dim": 16}, "vision_config": DEEP}),
    "qwen3_vl interleaved, tied, with biases": (
        "Qwen3VL",
        {
            "text_config": mrope(1e4, mrope_interleaved=True) | {"head_dim": 16, "attention_bias": True},
            "vision_config": DEEP,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        {
            "text_config": mrope(5e6)
            | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_only_layers": [1]},
            "vision_config": DEEP,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_engine_equals_transformers(case: str, make_checkpoint: MakeCheckpoint) -> None:
    """Each layout in all fixed modes; its variants in one."""
    family, config = CASES[case]
    check_all_modes(make_checkpoint(family, **config), FIXED_MODES if case.isidentifier() else ("hybrid",))


# names of tensors


Rename = Callable[[str], str]


def by_rules(*rules: tuple[str, str]) -> Rename:
    """Renames by the first pattern that matches the beginning."""

    def rename(name: str) -> str:
        return next((re.sub(f"^{old}", new, name) for old, new in rules if re.match(old, name)), name)

    return rename


LLAVA_NEW = by_rules(
    (r"language_model\.model\.", "model.language_model."),
    (r"language_model\.lm_head", "lm_head"),
    (r"(vision_tower|multi_modal_projector)", r"model.\1"),
)
KIMI_HUB = by_rules((r"language_model\.model\.blocks\.", "language_model.model.layers."))
KIMI_NEW = by_rules(
    (r"language_model\.model\.blocks\.", "model.language_model.layers."),
    (r"language_model\.model\.", "model.language_model."),
    (r"language_model\.lm_head", "lm_head"),
    (r"(vision_tower|mm_projector)", r"model.\1"),
)
QWEN_NEW = by_rules((r"model\.", "model.language_model."), (r"visual", "model.visual"))
NAMES: dict[str, tuple[str, Rename, str]] = {
    "gemma3": ("gemma3_mm untied", LLAVA_NEW, "model.language_model.layers.0.mlp.up_proj.weight"),
    "mistral3": ("mistral3", LLAVA_NEW, "lm_head.weight"),
    "kimi_k25, hub": ("kimi_k25", KIMI_HUB, "language_model.model.layers.0.mlp.up_proj.weight"),
    "kimi_k25": ("kimi_k25", KIMI_NEW, "model.language_model.layers.0.mlp.up_proj.weight"),
    "qwen2_vl": ("qwen2_vl", QWEN_NEW, "model.language_model.layers.0.mlp.up_proj.weight"),
}


def edited(source: Path, folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    """A copy of a checkpoint with other tensors, and another config."""
    text = (source / "config.json").read_text() if config is None else json.dumps(config)
    (folder / "config.json").write_text(text)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert lint_checkpoint(LintRequest("model", folder, None, "1", (), False)) == 0
    return folder


@pytest.mark.parametrize("case", NAMES)
def test_other_names_of_the_same_tensors(case: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """transformers writes the names of the first checkpoints; others have those of its modules."""
    name, rename, example = NAMES[case]
    family, config = CASES[name]
    source = make_checkpoint(family, **config)
    tensors = {rename(name): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    assert example in tensors
    folder = edited(source, tmp_path, tensors)
    assert_same(serve(folder, PROMPTS[:3], "hybrid"), serve(source, PROMPTS[:3], "hybrid"))


def test_experts_in_the_order_of_published_checkpoints(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Qwen3-VL's experts are [X, in, out] on the hub, and [X, out, in] as transformers 5 writes them."""
    family, config = CASES["qwen3_vl_moe"]
    source = make_checkpoint(family, **config)
    tensors = load_file(source / "model.safetensors")
    experts = [name for name in tensors if ".experts." in name]
    assert len(experts) == 4
    folder = edited(source, tmp_path, tensors | {name: tensors[name].transpose(1, 2) for name in experts})
    assert_same(serve(folder, PROMPTS[:3], "hybrid"), serve(source, PROMPTS[:3], "hybrid"))


def test_a_config_of_qwen2_vl_without_a_section(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Like those on the hub: the keys of the text model are at the top level, and the rotation has the type mrope."""
    family, config = CASES["qwen2_vl"]
    source = make_checkpoint(family, **config)
    data = json.loads((source / "config.json").read_text())
    flat = {**data.pop("text_config"), **data}
    rope = flat.pop("rope_parameters")
    flat |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    folder = edited(source, tmp_path, load_file(source / "model.safetensors"), flat)
    assert_same(serve(folder, PROMPTS[:3], "hybrid"), serve(source, PROMPTS[:3], "hybrid"))


@pytest.mark.parametrize("case", ["gemma3_mm", "qwen3_vl"])
def test_a_checkpoint_without_a_head_embeds(case: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The names of the bare multimodal model; embeddings are its last hidden states."""
    family, config = CASES[case]
    source = make_checkpoint(family, **config)
    bare = by_rules((r"language_model\.model\.", "language_model."), (r"model\.", ""))
    tensors = {bare(name): x for name, x in load_file(source / "model.safetensors").items() if "lm_head" not in name}
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    llm = LLM(tmp_path, dtype="float32", skip_tokenizer=True)
    prompt = PROMPTS[3]
    model = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        states = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
    found = llm.embed([prompt], pooling="last", normalize=False)[0].embedding
    np.testing.assert_allclose(np.asarray(found), states.numpy(), atol=1e-4)


# configs


def config_of(family: str, text: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"architectures": [f"{family}ForConditionalGeneration"], "text_config": text, **more}


def refusal(data: dict[str, Any], folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError) as caught:
        LLM(folder, skip_tokenizer=True)
    return str(caught.value)


def test_a_nested_text_model_without_a_layout_names_the_text_layout(tmp_path: Path) -> None:
    found = refusal(config_of("Llava", {"model_type": "llama"}), tmp_path)
    assert "expected an architecture with a layout, got LlavaForConditionalGeneration" in found
    assert "the text model in 'text_config' is one of the layout 'llama'" in found
    assert "`extends: llama` and `hf: {architectures: [LlavaForConditionalGeneration], root: text_config," in found
    data = {"architectures": ["InternVLChatModel"], "llm_config": {"architectures": ["Qwen2ForCausalLM"]}}
    assert "the text model in 'llm_config' is one of the layout 'qwen2'" in refusal(data, tmp_path)
    assert "'gemma3'" in refusal(config_of("PaliGemma", {"model_type": "gemma3_text"}), tmp_path)
    assert "known are" in refusal(config_of("Foo", {"model_type": "foo"}), tmp_path)


def test_an_architecture_with_another_text_model_is_refused(tmp_path: Path) -> None:
    found = refusal(config_of("Mistral3", {"model_type": "qwen2"}), tmp_path)
    assert "expected ministral3, mistral as" in found
    assert "'text_config.model_type' of Mistral3ForConditionalGeneration, got 'qwen2'" in found
    assert "one of the layout 'qwen2'" in found


def test_messages_name_the_section(tmp_path: Path) -> None:
    found = refusal(config_of("Gemma3", {"head_dim": "wide"}), tmp_path)
    assert found.endswith("config.json (text_config): 'head_dim': expected an integer, got 'wide'")
    found = refusal(config_of("Gemma3", {}, tie_word_embeddings=1), tmp_path)
    assert found.endswith("config.json: 'tie_word_embeddings': expected true or false, got 1")
    found = refusal({"architectures": ["Gemma3ForConditionalGeneration"], "hidden_size": 64}, tmp_path)
    assert "'text_config': expected an object with the config of the text model, got null" in found


@pytest.mark.parametrize("sections", [[2, 3], [2, 3, 4], [8, 0, 0], "2, 3, 3", [True, 3, 4]])
def test_sections_of_the_rotation_must_fill_a_head(sections: Any, tmp_path: Path) -> None:
    text = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": sections}}
    found = refusal(config_of("Qwen2VL", text | rope), tmp_path)
    assert "'mrope_section' must be a list of sizes with the sum 8" in found


def test_a_section_of_a_config() -> None:
    hf = HFConfig({"a": 1, "b": {"c": 2, "d": None}}, "x.json")
    section = hf.section("b")
    assert (section.int("c"), section.int("/a"), section.has("/b.c"), section.is_null("d")) == (2, 1, True, True)
    assert hf.section("none", is_flat_allowed=True).int("/a") == 1
    with pytest.raises(ConfigError, match=r"^x\.json \(b\): the key 'e' is missing, expected an integer$"):
        section.int("e")
    with pytest.raises(ConfigError, match=r"^x\.json: 'a': expected text, got 1$"):
        section.str("/a")
    with pytest.raises(ConfigError, match=r"^x\.json: 'a': expected an object"):
        hf.section("a")


# a layout of one's own


def test_the_layout_of_the_docs(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """docs/add-a-model.md: LLaVA over Llama, out of tree."""
    text = Path(driver.PACKAGE, "docs", "add-a-model.md").read_text(encoding="utf-8")
    (tmp_path / "specs" / "models").mkdir(parents=True)
    block = next(block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "model: llava" in block)
    (tmp_path / "specs" / "models" / "llava.yaml").write_text(block)
    driver.generate([tmp_path / "specs"], out=tmp_path / "made")
    vision = IMAGES | {"projection_dim": 32, "model_type": "clip_vision_model"}
    folder = make_checkpoint("Llava", text_config={"model_type": "llama"}, vision_config=vision)
    check_all_modes(folder, ("hybrid",), plugins=[tmp_path / "made"])
