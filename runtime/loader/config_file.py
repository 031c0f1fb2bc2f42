"""Reads a checkpoint's config.json and selects the layout of its architecture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.printable import printable
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.json_files import read_json


def read_config_file(path: Path) -> dict[str, Any]:
    """The JSON object in a config.json. Raises CheckpointError if the file is missing or holds anything else."""
    if not path.exists():
        raise CheckpointError(f"expected {path.name} in {path.parent}; pass the folder of a Hugging Face checkpoint")
    data = read_json(path)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {shown(data)}")
    return data


def layout_of(data: Mapping[str, Any], path: Path, layouts: Mapping[str, ModelLayout]) -> ModelLayout:
    """The layout of one of the config's `architectures`. Raises CheckpointError if no layout has one of them."""
    named = data.get("architectures")
    architectures = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for architecture in architectures:
        for layout in layouts.values():
            if architecture in layout.architectures:
                return layout
    got = ", ".join(printable(name, 60) for name in architectures[:8]) or "none"
    known = sorted(name for layout in layouts.values() for name in layout.architectures)
    raise CheckpointError(
        f"{path}: expected an architecture with a layout, got {got}; known are {', '.join(known)}. "
        "To add one: `sagellm new model NAME`, which prints the next step (docs/add-a-model.md)"
    )
