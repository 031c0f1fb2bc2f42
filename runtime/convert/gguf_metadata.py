"""The metadata of a GGUF file for a checkpoint: sizes, settings and rotation, as `specs/formats/gguf.yaml` names them.

They are the inverse of `loader/gguf_architectures.py`. A file that would not describe the same model is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sageLLM.runtime.convert.source import Source
from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.ir.text import to_text
from sageLLM.runtime.core.model.gguf import Architecture, factors_of
from sageLLM.runtime.core.model.hf_config import HFConfig, shown
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.model.rope import RopeSpec
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.execution_graph.builder import build_block_graph
from sageLLM.runtime.execution_graph.expand import expand
from sageLLM.runtime.loader.gguf_architectures import ARCHITECTURES, config_of, llama3_factors
from sageLLM.runtime.loader.gguf_reader import GgufHeader, GgufTensor

_NUMBER = re.compile(r"\d+\.\d+(e[+-]?\d+)?|\d+e[+-]?\d+")
MAIN_ROPES = ("", "full")
"""The names of the tables with the rotation of the metadata; those of local layers are constants."""


def architecture_name(source: Source) -> str:
    """`general.architecture` of the checkpoint's class. Raises CheckpointError if there is none."""
    for name, one in ARCHITECTURES.items():
        if one.hf in source.layout.architectures and one.hf in source.data["architectures"]:
            return name
    known = ", ".join(sorted(one.hf for one in ARCHITECTURES.values()))
    got = shown(source.data["architectures"][0])
    raise CheckpointError(f"{source.folder}: GGUF files must have one of the architectures {known}, got {got}")


def metadata_of(source: Source, name: str) -> dict[str, Any]:
    """The keys of the architecture `name`, without the tokenizer."""
    architecture = ARCHITECTURES[name]
    keys = _keys(source, architecture)
    keys |= {f"rope.{key}": value for key, value in _rope(source).items()}
    for key, other in architecture.copies.items():
        if other in keys:
            keys.setdefault(key, keys[other])
    keys["vocab_size"] = source.sizes.V
    return {"general.architecture": name, **{f"{name}.{key}": value for key, value in keys.items()}}


def rope_factors(source: Source) -> list[float] | None:
    """The factors of the wave lengths of Llama 3, which files have as a tensor."""
    rope = _main_rope(source)
    if rope is None or rope.kind != "llama3":
        return None
    return list(llama3_factors(rope.base, float((rope.scaling or {})["factor"]), rope.dim // 2))


def check_described(source: Source, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> None:
    """Raises CheckpointError if the file would describe another model than the checkpoint."""
    header = GgufHeader(path, metadata, tensors)
    try:
        config = config_of(header, rope_factors(source), "float32")
        found = source.layout.read_config(HFConfig(config, str(path)))
    except ConfigError as error:
        raise CheckpointError(f"{source.folder} cannot be described by a GGUF file: {error}") from None
    own, other = (_computation(source.layout, sizes) for sizes in (source.sizes, found))
    if (wrong := next((pair for pair in zip_longest(own, other) if pair[0] != pair[1]), None)) is not None:
        raise CheckpointError(
            f"{source.folder}: GGUF files of {metadata['general.architecture']} cannot describe this model, with "
            f"{wrong[0]!r:.200}; it would become {wrong[1]!r:.200}"
        )


def _computation(layout: ModelLayout, sizes: Any) -> list[str]:
    """The ops of a model line by line, and its rotations, with numbers as float32 has them."""
    graph = expand(build_block_graph(layout, sizes, "prefill", dtype="f32"), layout, sizes)
    lines = [*to_text(graph).splitlines()[1:], f"max_position = {sizes.max_position}"]
    for name, rope in sizes.rope.items():
        settings = {"base": rope.base, "dim": rope.dim, "length": rope.longest, **(rope.scaling or {})}
        lines += [f"rope {name} {key} = {value}" for key, value in sorted(settings.items())]
    return [_NUMBER.sub(lambda one: f"{float(one[0]):.6g}", line) for line in lines]


def _keys(source: Source, architecture: Architecture) -> dict[str, Any]:
    """The values of the keys; a product with one unknown factor determines it."""
    values = {"head_dim": source.sizes.D, **source.data, **source.values}
    found: dict[str, Any] = {}
    products: list[tuple[str, Any]] = []
    for key, product in architecture.keys.items():
        value = values.get(key)
        if product is None or (value is None and key in architecture.optional):
            continue
        if value is None:
            raise CheckpointError(f"{source.folder}/config.json: '{key}' must be present to write a GGUF file")
        if len(list(factors_of(product))) == 1:
            found.setdefault(product, value)
        else:
            products.append((product, value))
    for product, value in products:
        unknown = [(key, power) for key, power in factors_of(product) if key not in found]
        if len(unknown) == 1:
            [(key, power)] = unknown
            others = math.prod(found[one] ** other for one, other in factors_of(product) if one != key)
            found[key] = round((value / others) ** power)
    return found


def _main_rope(source: Source) -> RopeSpec | None:
    ropes = source.sizes.rope
    return next((ropes[name] for name in MAIN_ROPES if name in ropes), None)


def _rope(source: Source) -> dict[str, Any]:
    """The keys after `rope.`; kinds without keys are refused by `check_described`."""
    rope = _main_rope(source)
    if rope is None:
        return {}
    found: dict[str, Any] = {"freq_base": float(rope.base)}
    if rope.kind in ("linear", "yarn") and rope.scaling is not None:
        found |= {"scaling.type": rope.kind, "scaling.factor": float(rope.scaling["factor"])}
        if (original := rope.scaling.get("original_max_position_embeddings")) is not None:
            found["scaling.original_context_length"] = int(original)
    return found
