"""Reads pooling and normalisation from a checkpoint folder of the sentence-transformers library."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.execution_graph.embedding import Pooling
from sageLLM.runtime.loader.json_files import read_json

_MODES: Mapping[str, Pooling] = {"cls": "first", "mean": "mean", "lasttoken": "last"}
_FLAGS: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True, slots=True)
class EmbeddingRecipe:
    """The folder's settings: `pooling` is None if it has none; `unsupported` names a setting that is not supported."""

    pooling: Pooling | None = None
    normalize: bool = False
    unsupported: str | None = None


def read_recipe(folder: Path) -> EmbeddingRecipe:
    """The recipe in modules.json and the config.json of its Pooling module; an empty one without modules.json.

    Raises CheckpointError for a damaged file.
    """
    path = folder / "modules.json"
    if not path.exists():
        return EmbeddingRecipe()
    modules = read_json(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{path} must hold a list of modules, got {shown(modules)}; download it again")
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module for module in modules}
    unknown = sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        return EmbeddingRecipe(unsupported=f"{path} names the module {unknown[0]}, which is not supported")
    if "Pooling" not in kinds:
        return EmbeddingRecipe(normalize="Normalize" in kinds)
    config = _module_folder(path, kinds["Pooling"].get("path", "")) / "config.json"
    pooling = _pooling(read_json(config))
    if pooling is None:
        return EmbeddingRecipe(unsupported=f"{config} requests a pooling that is not supported")
    return EmbeddingRecipe(pooling, "Normalize" in kinds)


def _module_folder(path: Path, name: object) -> Path:
    """The folder of a module. Names outside the folder of modules.json are rejected: they could read any file."""
    parts = name.replace("\\", "/").split("/") if isinstance(name, str) else None
    if parts is None or not isinstance(name, str) or ".." in parts or (name and not parts[0]) or ":" in parts[0]:
        raise CheckpointError(f"{path}: the path of a module must be a folder inside {path.parent}, got {shown(name)}")
    return path.parent / name


def _pooling(config: Any) -> Pooling | None:
    """The pooling in a config.json of the Pooling module, in its old (flags) or new (one name) form.

    None if it is unsupported, or if several are combined.
    """
    if not isinstance(config, dict):
        return None
    if "pooling_mode" in config:
        return _MODES.get(str(config["pooling_mode"]))
    enabled = [name for name, flag in config.items() if name.startswith("pooling_mode_") and flag is True]
    return _FLAGS.get(enabled[0]) if len(enabled) == 1 else None
