"""Config defaults of every layout, compared with the config classes of transformers."""

from dataclasses import replace
from typing import Any

import pytest
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sageLLM.generated.builders import MODELS
from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.model.hf_config import HFConfig

TABLES = (
    modeling_auto.MODEL_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
MODEL_TYPES = {
    name: model_type
    for table in TABLES
    for model_type, names in table.items()
    for name in ([names] if isinstance(names, str) else names)
}
MODEL_TYPES["MPTForCausalLM"] = "mpt"  # the names of the classes in the checkpoints' own code
MODEL_TYPES["PhiMoEForCausalLM"] = "phimoe"
MODEL_TYPES["ExaoneMoEForCausalLM"] = "exaone_moe"
MODEL_TYPES["KimiK25ForConditionalGeneration"] = "kimi_k25"
ARCHITECTURES = [(layout, name) for layout in MODELS for name in MODELS[layout].architectures]
REQUIRED = {
    "roberta": {"vocab_size": 50265},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"num_experts_per_tok": 6, "n_routed_experts": 8, "n_shared_experts": 1},
    "glm4_moe": {"head_dim": 128},
    "granitemoehybrid": {"layer_types": ["full_attention"] * 32},
}
"""Keys without a usable default: three classes share roberta and differ in it; those of DeepSeek V2 and dots.llm1 are
null, GLM-4.5 would rotate 21 components of a head, and Granite 4.0 would have state-space layers alone."""
WITH_ROPE = [name for name in MODELS if MODELS[name].read_config(HFConfig(MODELS[name].tiny)).rope]


def config_class(architecture: str) -> Any:
    return getattr(transformers, CONFIG_MAPPING_NAMES[MODEL_TYPES[architecture]])


def class_config(name: str, architecture: str) -> dict[str, Any]:
    """The config with all defaults, with every key written out."""
    layout, cls = MODELS[name], config_class(architecture)
    kind = {"model_type": layout.model_types[0]} if layout.model_types else {}
    made = cls(**{layout.root: kind}) if layout.root else cls(**REQUIRED.get(name, {}))
    return without_nulls(name, made.to_dict())


def without_nulls(name: str, data: dict[str, Any], keep: str | None = None) -> dict[str, Any]:
    """The config without keys that are null, in the section of the text model too; the key `keep` stays."""
    found = {key: value for key, value in data.items() if value is not None or key == keep}
    root = MODELS[name].root
    return found | {root: {k: v for k, v in data[root].items() if v is not None or k == keep}} if root else found


def changed(name: str, data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The config with other keys of the text model."""
    root = MODELS[name].root
    return {**data, root: {**data[root], **changes}} if root else {**data, **changes}


def tiny(name: str, **changes: Any) -> HFConfig:
    return HFConfig(changed(name, dict(MODELS[name].tiny), **changes))


def read(layout: str, data: dict[str, Any]) -> Any:
    """The config, without the sliding window where the config switches it off, and the list of `is_sparse`."""
    config = MODELS[layout].read_config(HFConfig(data))
    config = replace(config, sparse_layers=()) if hasattr(config, "sparse_layers") else config
    return config if getattr(config, "sliding", True) else replace(config, window=None)


@pytest.mark.parametrize(("name", "architecture"), ARCHITECTURES)
def test_absent_keys_have_the_defaults_of_the_config_class(name: str, architecture: str) -> None:
    """Stripped of all its keys, the config of the class reads as it does with every key written out."""
    written = class_config(name, architecture)
    stripped = {key: written[key] for key in REQUIRED.get(name, ())}
    stripped |= {MODELS[name].root: {}} if MODELS[name].root else {}
    assert read(name, stripped) == read(name, written)


@pytest.mark.parametrize(("name", "architecture"), ARCHITECTURES)
def test_null_keys_are_null_or_refused(name: str, architecture: str) -> None:
    """A key that is null has the value that the config class computes, unless the class or the layout refuses null."""
    written = class_config(name, architecture)
    root = MODELS[name].root
    changes = [(key, {**written, key: None}) for key in written if key != root]
    changes += [(key, changed(name, written, **{key: None})) for key in written[root]] if root else []
    for key, data in changes:
        try:
            found = read(name, data)
        except ConfigError as error:
            assert f"'{key}': expected" in str(error) or "requires" in str(error)
            continue
        try:
            expected = config_class(architecture).from_dict(data).to_dict()
        except Exception:  # the class refuses null with an error of any type
            continue
        assert found == read(name, without_nulls(name, expected, keep=key)), key


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("alpha", {"rope_type": "linear", "factor": 2.0, "alpha": 1000.0}),
    ("llama_4_scaling_beta", {"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}),
    ("factr", {"rope_type": "default", "factr": 2.0}),
    ("attention_factor", {"rope_type": "linear", "factor": 2.0, "attention_factor": 0.5}),
    ("low_freq_factor", {"type": "yarn", "factor": 2.0, "low_freq_factor": 1.0}),
    ("factor", {"rope_type": "default", "factor": 2.0}),
]


WITHOUT_OLD_SECTION = ("mellum",)
"""Layouts of which `transformers` ignores `rope_scaling`."""


@pytest.mark.parametrize("name", WITH_ROPE)
@pytest.mark.parametrize(("key", "scaling"), CHANGES, ids=[key for key, _ in CHANGES])
def test_a_key_that_changes_the_rotation_is_refused(name: str, key: str, scaling: dict[str, Any]) -> None:
    layout = MODELS[name]
    if name == "gptj":
        pytest.skip("transformers reads no rope section for GPT-J")
    if name.startswith("ministral3") and key == "llama_4_scaling_beta":
        pytest.skip("a key that the layout reads")
    sections = ("rope_parameters",) if name in WITHOUT_OLD_SECTION else ("rope_scaling", "rope_parameters")
    for section in sections:
        nested = (
            {"full_attention": scaling, "sliding_attention": scaling} if "full" in name_of_tables(name) else scaling
        )
        value = nested if section == "rope_parameters" else scaling
        with pytest.raises(ConfigError) as caught:
            layout.read_config(tiny(name, **{section: value}))
        assert f".{key}' is not a parameter of rope scaling" in str(caught.value) or "is not supported" in str(
            caught.value
        )


def name_of_tables(name: str) -> tuple[str, ...]:
    return tuple(MODELS[name].read_config(HFConfig(MODELS[name].tiny)).rope)


PARTIAL = ("glm", "glm4", "glm4_moe", "gpt_neox", "gptj", "minimax_m2", "nemotron", "phi", "phi3", "stablelm")
WHOLE = [name for name in WITH_ROPE if name not in PARTIAL]


@pytest.mark.parametrize("name", WHOLE)
def test_a_partial_rotation_of_a_layout_without_one_is_refused(name: str) -> None:
    layout = MODELS[name]
    with pytest.raises(ConfigError, match=r"'partial_rotary_factor' must be absent or 1\.0"):
        layout.read_config(tiny(name, partial_rotary_factor=0.5))
    assert layout.read_config(tiny(name, partial_rotary_factor=1.0)).rope
    tables = name_of_tables(name)
    section: dict[str, Any] = {"rope_type": "default", "partial_rotary_factor": 0.5}
    nested = {"full_attention": section} if "full" in tables else section
    with pytest.raises(ConfigError, match=r"partial_rotary_factor' must be absent or 1\.0"):
        layout.read_config(tiny(name, rope_parameters=nested))
