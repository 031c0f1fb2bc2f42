"""Finds what reads a checkpoint: its config.json, and the layout of the architecture that it names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.errors import CheckpointError


def read_config_file(path: Path) -> dict[str, Any]:
    """The JSON object of a config.json; CheckpointError where it is none."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; give the folder of a Hugging Face checkpoint"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; download it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {shown(data)}")
    return data


def layout_of(data: Mapping[str, Any], path: Path, layouts: Mapping[str, ModelLayout]) -> ModelLayout:
    """The layout that reads one of the config's `architectures`; CheckpointError if there is none."""
    named = data.get("architectures")
    architectures = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for architecture in architectures:
        for layout in layouts.values():
            if architecture in layout.architectures:
                return layout
    asked = ", ".join(name[:60] for name in architectures) or "a checkpoint without `architectures`"
    known = sorted(name for layout in layouts.values() for name in layout.architectures)
    raise CheckpointError(
        f"{path}: no layout reads {asked}; "
        f"known are {', '.join(known)}. To add one: `sagellm new model NAME`, then `sagellm generate` "
        "(docs/add-a-model.md)"
    )
