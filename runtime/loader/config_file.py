"""Reads a checkpoint's config.json and selects the layout of its architecture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.model.layout_table import LayoutTable
from sageLLM.runtime.core.printable import printable
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.json_files import read_json

NESTED_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config.text_config")
"""Sections of config.json with the text model of a model with images or sound."""


def read_config_file(path: Path) -> dict[str, Any]:
    """The JSON object in a config.json. Raises CheckpointError if the file is missing or holds anything else."""
    if not path.exists():
        what = f"expected {path.name} in {path.parent}" if path.parent.is_dir() else f"{path.parent} is not a folder"
        raise CheckpointError(f"{what}; pass the folder of a Hugging Face checkpoint, or a GGUF file")
    data = read_json(path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {shown(data)}")
    return data


def layout_of(data: Mapping[str, Any], path: Path, layouts: LayoutTable) -> ModelLayout:
    """The layout of one of the config's `architectures`. Raises CheckpointError if no layout has one of them."""
    architectures = _architectures(data)
    for architecture in architectures:
        readers = layouts.readers_of(architecture)
        if readers:
            return _reader_of(architecture, data, path, readers, layouts)
    got = ", ".join(printable(name, 60) for name in architectures[:8]) or "none"
    for root in NESTED_CONFIGS:
        hint = _text_layout_hint(architectures[:1], data, root, layouts)
        if hint:
            raise CheckpointError(f"{path}: expected an architecture with a layout, got {got}; {hint}")
    raise CheckpointError(
        f"{path}: expected an architecture with a layout, got {got}; known are "
        f"{', '.join(sorted(layouts.architectures))}. "
        "To add one: `sagellm new model NAME`, which prints the next step (docs/add-a-model.md)"
    )


def text_section(data: Mapping[str, Any], root: str) -> Mapping[str, Any]:
    """The section of a config with the text model; the whole config if it has no such section."""
    section: Any = data
    for key in root.split(".") if root else ():
        section = section.get(key) if isinstance(section, Mapping) else None
    return section if isinstance(section, Mapping) else data


def _reader_of(
    architecture: str,
    data: Mapping[str, Any],
    path: Path,
    readers: list[ModelLayout],
    layouts: LayoutTable,
) -> ModelLayout:
    """The layout that reads the text model of the config, if the architecture has text models of several kinds."""
    for layout in readers:
        kind = text_section(data, layout.root).get("model_type") if layout.model_types else None
        if kind is None or kind in layout.model_types:
            return layout
    root = readers[0].root
    known = ", ".join(kind for layout in readers for kind in layout.model_types)
    hint = _text_layout_hint([architecture], data, root, layouts)
    raise CheckpointError(
        f"{path}: expected {known} as '{root}.model_type' of {architecture}, "
        f"got {shown(text_section(data, root).get('model_type'))}" + (f"; {hint}" if hint else "")
    )


def _text_layout_hint(architectures: list[str], data: Mapping[str, Any], root: str, layouts: LayoutTable) -> str | None:
    """How a layout of the text model in the section `root` can be used; None without one."""
    section = text_section(data, root)
    if section is data:
        return None
    kind = section.get("model_type")
    names = {kind, kind.removesuffix("_text")} if isinstance(kind, str) else set()
    for layout in layouts.values():
        if layout.name in names or not set(_architectures(section)).isdisjoint(layout.architectures):
            architecture = printable(architectures[0], 60) if architectures else "..."
            return (
                f"the text model in '{root}' is one of the layout '{layout.name}': a layout with "
                f"`extends: {layout.name}` and `hf: {{architectures: [{architecture}], root: {root}, names: ...}}` "
                "reads it (docs/add-a-model.md)"
            )
    return None


def _architectures(data: Mapping[str, Any]) -> list[str]:
    named = data.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
