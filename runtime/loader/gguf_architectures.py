"""Configs and tensor names of the architectures of GGUF files, as those of Hugging Face checkpoints.

The architectures are those of `specs/formats/gguf.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sageLLM.generated.formats import METHODS
from sageLLM.runtime.core.model.gguf import Architecture, factors_of
from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.gguf_reader import GgufHeader

METHOD = "gguf"
ROPE_FACTORS = "rope_freqs.weight"
"""A tensor with the factors of the wave lengths of Llama 3.1 and later."""
PREFIX = "model.layers."
"""The names of layers in Hugging Face checkpoints."""
ARCHITECTURES: Mapping[str, Architecture] = {
    name: one.with_defaults(METHODS[METHOD].architecture_defaults)
    for name, one in METHODS[METHOD].architectures.items()
}
"""By `general.architecture`."""


def architecture_of(header: GgufHeader) -> Architecture:
    """Raises CheckpointError for an architecture without an entry, and for a file of several."""
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{header.path}: 'general.architecture' must be one of {known}, got {shown(name)}")
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise CheckpointError(f"{header.path}: 'split.count' must be 1; merge the files with llama-gguf-split --merge")
    found = ARCHITECTURES[name]
    for key, values in found.refused.items():
        if (value := header.metadata.get(f"{name}.{key}")) in values:
            raise CheckpointError(
                f"{header.path}: '{name}.{key}' of {value} is not supported: such files do not determine the config; "
                "use the checkpoint of Hugging Face"
            )
    return found


def config_of(header: GgufHeader, factors: Sequence[float] | None, dtype: str) -> dict[str, Any]:
    """A config.json with the sizes and the rotation of the metadata; `factors` are the values of ROPE_FACTORS."""
    architecture = architecture_of(header)
    kind = architecture.model_type or header.metadata["general.architecture"]
    config: dict[str, Any] = {"architectures": [architecture.hf], "model_type": kind, "dtype": dtype}
    for key, product in architecture.keys.items():
        if (
            product is not None
            and (value := _value(header, product, is_optional=key in architecture.optional)) is not None
        ):
            config[key] = value
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{header.path}: expected the tensor 'token_embd.weight'; pass a file with a whole model")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config |= {key: tensor in header.tensors for key, tensor in architecture.present.items()}
    config |= {key: header.metadata[f"tokenizer.ggml.{key}"] for key in ("bos_token_id", "eos_token_id")
               if f"tokenizer.ggml.{key}" in header.metadata}  # fmt: skip
    return {**config, **architecture.constants, **_rope_section(header, architecture, factors)}


def _value(header: GgufHeader, product: str, *, is_optional: bool) -> Any:
    """The value of a key of the metadata, or of a product of several; None if an optional one is absent."""
    name = header.metadata["general.architecture"]
    found: Any = 1
    for key, power in factors_of(product):
        value = header.metadata.get(f"{name}.{key}")
        if value is None and is_optional:
            return None
        if type(value) not in (int, float, bool) or (power < 0 and not value):
            raise CheckpointError(f"{header.path}: '{name}.{key}' must be a number, got {shown(value)}")
        found = value if product == key else found * value if power > 0 else found / value
    return _shortest(found) if isinstance(found, float) else found


def _shortest(value: float) -> float:
    """The number with the fewest digits that is stored as this float32: 1e-5 for 9.99999975e-06."""
    with np.errstate(over="ignore"):
        short = np.float32(value)
    return float(str(short)) if float(short) == value else value


def _rope_section(header: GgufHeader, architecture: Architecture, factors: Sequence[float] | None) -> dict[str, Any]:
    """The section of config.json with the rotation."""
    section = _rope(header, header.metadata["general.architecture"], factors)
    if architecture.rope == "rope_parameters":
        return {"rope_parameters": section}
    theta = section.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if section["rope_type"] == "default" else section}


def _rope(header: GgufHeader, name: str, factors: Sequence[float] | None) -> dict[str, Any]:
    """The section `rope_parameters`."""
    metadata = header.metadata
    theta = metadata.get(f"{name}.rope.freq_base", 10000.0)
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        raise CheckpointError(f"{header.path}: '{name}.rope.freq_base' must be a positive number, got {shown(theta)}")
    kind = metadata.get(f"{name}.rope.scaling.type", "none")
    if factors is not None:
        return _llama3(header, theta, factors)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = metadata.get(f"{name}.rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        original = metadata.get(f"{name}.rope.scaling.original_context_length")
        section = {"rope_type": "yarn", "rope_theta": theta, "factor": factor}
        return section | ({} if original is None else {"original_max_position_embeddings": original})
    raise CheckpointError(f"{header.path}: '{name}.rope.scaling.type' must be none, linear or yarn, got {shown(kind)}")


def _llama3(header: GgufHeader, theta: float, factors: Sequence[float]) -> dict[str, Any]:
    """The settings of Llama 3 with these factors, which are compared with those that the settings define."""
    factor = max(factors, default=1.0)
    section = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = list(llama3_factors(theta, factor, len(factors)))
    if not all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(factors, expected, strict=True)):
        raise CheckpointError(f"{header.path}: the tensor '{ROPE_FACTORS}' must have the factors of Llama 3")
    return section


def llama3_factors(theta: float, factor: float, count: int) -> Iterator[float]:
    """1 for short wave lengths, `factor` for long ones, and between them a smooth transition."""
    longest, shortest = 8192 / 1.0, 8192 / 4.0
    for i in range(count):
        length = 2 * math.pi * theta ** (i / count)
        smooth = (8192 / length - 1.0) / (4.0 - 1.0)
        transition = 1 / ((1 - smooth) / factor + smooth) if smooth else factor
        yield 1.0 if length < shortest else factor if length > longest else transition


@dataclass(frozen=True, slots=True)
class TensorName:
    """The name of a tensor in Hugging Face checkpoints, with `{e}` in that of a stack of experts.

    `stem` is the name in files, without the layer and the last part.
    """

    name: str
    stem: str

    @property
    def has_experts(self) -> bool:
        return "{e}" in self.name

    def of(self, expert: int) -> str:
        return self.name.replace("{e}", str(expert))


def name_of(stored: str, architecture: Architecture) -> TensorName | None:
    """The name of a tensor of a file; None for an unknown one."""
    stem, _, end = stored.rpartition(".")
    prefix = ""
    if stem.startswith("blk."):
        _, layer, stem = stem.split(".", 2) if stem.count(".") >= 2 else ("", "", "")
        prefix = f"{PREFIX}{layer}."
    name = architecture.names.get(stem)
    if name is not None and bool(prefix) == (not name.startswith(("model.", "lm_head"))):
        return TensorName(f"{prefix}{name}.{end}", stem)
    if prefix and stem in architecture.experts:
        return TensorName(f"{prefix}{architecture.experts[stem]}.{end}", stem)
    return None


def stored_name(name: str, architecture: Architecture) -> tuple[str, int | None] | None:
    """The name in files of a tensor of a checkpoint, and its expert in a stack of them; None for an unknown one."""
    stem, _, end = name.rpartition(".")
    block = ""
    if stem.startswith(PREFIX):
        layer, _, stem = stem.removeprefix(PREFIX).partition(".")
        block = f"blk.{layer}."
    for stored, own in architecture.names.items():
        if own == stem:
            return f"{block}{stored}.{end}", None
    for stored, own in architecture.experts.items() if block else ():
        head, _, tail = own.partition("{e}")
        expert = stem.removeprefix(head).removesuffix(tail)
        if expert.isdecimal() and stem == f"{head}{expert}{tail}":
            return f"{block}{stored}.{end}", int(expert)
    return None
