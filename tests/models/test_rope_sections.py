"""Rope sections of a config: `rope_scaling` together with `rope_parameters`, and the checks of their keys."""

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sageLLM.generated.builders import MODELS
from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.rope import RopeSpec, read_rope
from sageLLM.runtime.loader.rope import rope_rows

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LAYOUTS = {"llama": "LlamaConfig", "stablelm": "StableLmConfig", "gpt_neox": "GPTNeoXConfig", "phi": "PhiConfig"}


def read(layout: str, **changes: Any) -> Any:
    return MODELS[layout].read_config(HFConfig({**MODELS[layout].tiny, **changes}))


def read_plain(base: float, *, reads_theta: bool) -> RopeSpec:
    hf = HFConfig({"rope_parameters": PLAIN})
    keys, allow = ("rope_parameters",), ("default",)
    return read_rope(hf, base=base, dim=8, max_position=64, keys=keys, allow=allow, reads_theta=reads_theta)


def test_a_base_that_is_computed_from_rope_theta_may_differ_from_it() -> None:
    assert read_plain(20000.0, reads_theta=True).base == 20000.0
    with pytest.raises(ConfigError, match="must equal the base frequency 20000"):
        read_plain(20000.0, reads_theta=False)


@pytest.mark.parametrize("base", [0.0, -1.0, float("nan")])
def test_a_base_must_be_positive(base: float) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        read_plain(base, reads_theta=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "sections",
    [
        {"rope_parameters": PLAIN, "rope_scaling": LINEAR},
        {"rope_parameters": PLAIN, "rope_scaling": {**LINEAR, "rope_theta": 5000.0}},
        {"rope_parameters": {**PLAIN, **LINEAR}, "rope_scaling": LINEAR},
        {"rope_parameters": {**PLAIN, **LINEAR}, "rope_scaling": {}},
        {"rope_parameters": {**PLAIN, **LINEAR}, "rope_scaling": None},
    ],
)
def test_rope_scaling_together_with_rope_parameters(layout: str, sections: dict[str, Any]) -> None:
    """The frequencies equal those of transformers, in which a non-empty `rope_scaling` wins."""
    data = {**MODELS[layout].tiny, **sections}
    rope = MODELS[layout].read_config(HFConfig(data)).rope[""]
    config = getattr(transformers, LAYOUTS[layout]).from_dict(
        {k: dict(v) if isinstance(v, dict) else v for k, v in data.items()}
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["linear"](config, "cpu")
    assert rope_rows(rope, torch.tensor([1]), 2).sin[0].tolist() == pytest.approx(frequencies.sin().tolist())


def test_rope_scaling_updates_the_section_of_full_attention() -> None:
    """As Gemma3TextConfig does, which has a section per layer type."""
    sections = {"full_attention": {"rope_type": "default", "rope_theta": 5e5}, "sliding_attention": PLAIN}
    rope = read("gemma3", rope_parameters=sections, rope_scaling={"rope_type": "linear", "factor": 8.0}).rope
    assert (rope["full"].base, rope["full"].scaling) == (5e5, {"factor": 8.0, "rope_type": "linear"})
    assert rope["local"].scaling is None


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN},
        "'rope_parameters.rope_theta' is 1000000.0, but 'rope_scaling' replaces 'rope_parameters' and lacks "
        "'rope_theta'; add it there, or merge the two into 'rope_parameters'",
    ),
    (
        "llama",
        {"rope_parameters": {**PLAIN, **LINEAR}, "rope_scaling": YARN},
        "'rope_parameters' and 'rope_scaling' are two different rope scalings; remove the one that is not meant",
    ),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
        "'rope_scaling.rope_type' is 'yarn', but 'rope_scaling.type' is 'linear'; remove one of them",
    ),
    (
        "llama",
        {"rope_scaling": {**YARN, "llama_4_scaling_beta": 0.1}},
        "'rope_scaling.llama_4_scaling_beta' is not a parameter of rope scaling 'yarn', which might change the model; "
        "known are factor, original_max_position_embeddings, attention_factor, beta_fast, beta_slow, mscale, "
        "mscale_all_dim, truncate",
    ),
    (
        "hunyuan_v1_dense",
        {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 2.0}},
        "'rope_scaling.factor' is not a parameter of rope scaling 'ntk_alpha', which might change the model; known are "
        "alpha",
    ),
    (
        "llama",
        {"rope_scaling": {**YARN, "truncate": 1}},
        "'truncate' of rope scaling 'yarn' must be true or false, got 1",
    ),
    (
        "gemma3",
        {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
        "'rope_parameters.rope_type': expected an object for a layer type, got 'linear'; move the parameters into the "
        "sections of the layer types",
    ),
    (
        "gemma3",
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0, "rope_theta": 7.0}},
        "'rope_scaling.rope_theta' must equal the base frequency 1e+06, got 7.0; remove one of the two",
    ),
]


@pytest.mark.parametrize(("layout", "changes", "message"), REFUSED)
def test_a_rope_section_that_cannot_be_meant_is_refused(layout: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(layout, **changes)
    assert str(caught.value) == f"config.json: {message}"


def test_keys_without_effect_are_accepted() -> None:
    """Those of published YaRN checkpoints of Llama 2."""
    scaling = read("llama", rope_scaling={**YARN, "finetuned": True, "attn_factor": 1.0}).rope[""].scaling
    assert scaling == {"factor": 4.0, "original_max_position_embeddings": 64.0, "rope_type": "yarn"}


def test_rope_sections_that_the_config_class_fills_in() -> None:
    """gpt-oss is scaled by default, and Phi-3 has a trained length."""
    gpt_oss = {key: value for key, value in MODELS["gpt_oss"].tiny.items() if "rope" not in key}
    rope = MODELS["gpt_oss"].read_config(HFConfig(gpt_oss)).rope[""]
    assert (rope.base, rope.scaling["rope_type"], rope.scaling["factor"]) == (150000.0, "yarn", 32.0)
    assert MODELS["gpt_oss"].read_config(HFConfig({**gpt_oss, "rope_parameters": {}})).rope[""].scaling is None
    config = MODELS["phi3"].read_config(HFConfig(MODELS["phi3"].tiny))
    factors = {"short_factor": [1.0] * (config.Dr // 2), "long_factor": [2.0] * (config.Dr // 2)}
    rope = read("phi3", rope_scaling={"type": "su", **factors}).rope[""]
    assert rope.scaling["original_max_position_embeddings"] == 4096


LENGTHS: list[tuple[dict[str, Any], int]] = [
    ({}, 256),
    ({"rope_scaling": {**YARN, "factor": 8.0}}, 512),
    ({"rope_scaling": YARN}, 256),  # the config's own positions include the scaling
    ({"rope_scaling": {"type": "yarn", "factor": 2.5}}, 640),
    ({"rope_scaling": LINEAR}, 512),
    ({"rope_scaling": {**LINEAR, "factor": 0.5}}, 256),
    ({"rope_scaling": {**LINEAR, "factor": 1e300}}, 2**31 - 1),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 512),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, 256),
]


@pytest.mark.parametrize(("changes", "longest"), LENGTHS)
def test_a_scaling_extends_the_longest_sequence(changes: dict[str, Any], longest: int) -> None:
    assert read("llama", max_position_embeddings=256, **changes).longest == longest


def test_tables_per_layer_type_keep_the_longest_sequence() -> None:
    scaled = read("gemma3", max_position_embeddings=256, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert scaled.longest == 256
