"""Reads how a checkpoint folder of the sentence-transformers library pools and normalises."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.execution_graph.embedding import Pooling

_MODES: Mapping[str, Pooling] = {"cls": "first", "mean": "mean", "lasttoken": "last"}
_FLAGS: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True, slots=True)
class EmbeddingRecipe:
    """What the folder says; `pooling` is None where it says nothing, `refusal` names what is not computed here."""

    pooling: Pooling | None = None
    normalize: bool = False
    refusal: str | None = None


def read_recipe(folder: Path) -> EmbeddingRecipe:
    """The recipe in modules.json and the config.json of its Pooling module; an empty one if there is none.

    Raises CheckpointError for a file that cannot be read as what it should be.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return EmbeddingRecipe()
    modules = _load(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{path} must hold a list of modules, not {shown(modules)}; download it again")
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module for module in modules}
    unknown = sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        return EmbeddingRecipe(refusal=f"{path} names the module {unknown[0]}, which is not computed here")
    if "Pooling" not in kinds:
        return EmbeddingRecipe(normalize="Normalize" in kinds)
    place = folder / str(kinds["Pooling"].get("path", "")) / "config.json"
    pooling = _pooling(_load(place))
    if pooling is None:
        return EmbeddingRecipe(refusal=f"{place} asks for a pooling that is not computed here")
    return EmbeddingRecipe(pooling, "Normalize" in kinds)


def _pooling(config: Any) -> Pooling | None:
    """The one pooling that a config.json of the Pooling module asks for; both forms of that file are read."""
    if not isinstance(config, dict):
        return None
    if "pooling_mode" in config:
        return _MODES.get(str(config["pooling_mode"]))
    asked = [name for name, wanted in config.items() if name.startswith("pooling_mode_") and wanted is True]
    return _FLAGS.get(asked[0]) if len(asked) == 1 else None


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; download it again") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; download it again") from None
