"""Reads the settings of embeddings from a checkpoint folder of the sentence-transformers library."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.execution_graph.embedding import Pooling
from sageLLM.runtime.loader.gguf_folder import SUFFIX, gguf_folder
from sageLLM.runtime.loader.json_files import read_json

_MODES: Mapping[str, Pooling] = {"cls": "first", "mean": "mean", "lasttoken": "last"}
_FLAGS: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


PROMPTS_FILE = "config_sentence_transformers.json"
# The file of the Transformer module; the library still reads the old names.
TRANSFORMER_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_camembert_config.json",
    "sentence_xlm-roberta_config.json",
)


@dataclass(frozen=True, slots=True)
class EmbeddingRecipe:
    """The folder's settings: `pooling` is None if it has none; `unsupported` names a setting that is not supported.

    `truncates`: texts are cut to `max_seq_length` tokens, or without one to the length of the model. `prompts` are
    texts by name that are written before each text to embed, `default_prompt` the name of the one for calls without a
    name. Without `includes_prompt`, the pooling excludes the tokens of the prompt.
    """

    pooling: Pooling | None = None
    normalize: bool = False
    unsupported: str | None = None
    truncates: bool = False
    max_seq_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    includes_prompt: bool = True


def model_folder(folder: Path) -> Path:
    """The folder with the config, the weights and the tokenizer; for a GGUF file one in the user's cache.

    Some folders of sentence-transformers have them in that of the Transformer module, `0_Transformer`. Raises
    CheckpointError for a damaged modules.json, and for a GGUF file that cannot be read.
    """
    if folder.suffix == SUFFIX and folder.is_file():
        return gguf_folder(folder)
    path = folder / "modules.json"
    if (folder / "config.json").exists() or not path.exists():
        return folder
    return _module_folder(path, _modules(path).get("Transformer", {}).get("path", ""))


def read_recipe(folder: Path) -> EmbeddingRecipe:
    """The recipe in modules.json and the files of its modules; an empty one without modules.json.

    Raises CheckpointError for a damaged file.
    """
    path = folder / "modules.json"
    if not path.exists():
        return EmbeddingRecipe()
    kinds = _modules(path)
    transformer = _module_folder(path, kinds.get("Transformer", {}).get("path", ""))
    recipe = _with_prompts(_with_limits(EmbeddingRecipe(truncates=True), transformer), folder)
    unknown = sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        return replace(recipe, unsupported=f"{path} names the module {unknown[0]}, which is not supported")
    if "Pooling" not in kinds:
        return replace(recipe, normalize="Normalize" in kinds)
    config = _module_folder(path, kinds["Pooling"].get("path", "")) / "config.json"
    settings = read_json(config)
    pooling = _pooling(settings)
    if pooling is None:
        return replace(recipe, unsupported=f"{config} requests a pooling that is not supported")
    includes_prompt = settings.get("include_prompt") is not False
    return replace(recipe, pooling=pooling, normalize="Normalize" in kinds, includes_prompt=includes_prompt)


def _modules(path: Path) -> dict[str, dict[str, Any]]:
    """The modules in modules.json by the name of their class."""
    modules = read_json(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{path} must hold a list of modules, got {shown(modules)}; download it again")
    return {str(module.get("type", "")).rpartition(".")[2]: module for module in modules}


def _with_limits(recipe: EmbeddingRecipe, transformer: Path) -> EmbeddingRecipe:
    """The recipe with the settings of the Transformer module."""
    path = next((transformer / name for name in TRANSFORMER_FILES if (transformer / name).exists()), None)
    settings = {} if path is None else _object(path)
    length, lower_case = settings.get("max_seq_length"), settings.get("do_lower_case")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise CheckpointError(f"{path}: 'max_seq_length' must be an integer of at least 1, got {shown(length)}")
    if length is None:  # the library then takes the tokenizer's length
        path = transformer / "tokenizer_config.json"
        found = _object(path).get("model_max_length") if path.exists() else None
        length = found if isinstance(found, int) and not isinstance(found, bool) and found >= 1 else None
    return replace(recipe, max_seq_length=length, lower_case=lower_case is True)


def _with_prompts(recipe: EmbeddingRecipe, folder: Path) -> EmbeddingRecipe:
    path = folder / PROMPTS_FILE
    if not path.exists():
        return recipe
    settings = _object(path)
    prompts, default = settings.get("prompts"), settings.get("default_prompt_name")
    prompts = {} if prompts is None else prompts
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(f"{path}: 'prompts' must be an object of texts, got {shown(prompts)}")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        known = ", ".join(map(shown, prompts)) or "it has none"
        raise CheckpointError(
            f"{path}: 'default_prompt_name' must be one of its prompts ({known}), got {shown(default)}"
        )
    return replace(recipe, prompts=prompts, default_prompt=default)


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {shown(value)}; download it again")
    return value


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
