"""Reads model.safetensors.index.json: the tensors of a sharded checkpoint and the file of each."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.files import read_regular_file

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_INDEX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a checkpoint: its shape, and its element type as torch spells it; None if unknown, as in an index."""

    shape: tuple[int, ...] | None = None
    dtype: str | None = None


def has_single_file(folder: Path) -> bool:
    """Whether all tensors are in one file. An index next to it is then stale, unless the file is one of its shards."""
    if not (folder / SINGLE_FILE).is_file():
        return False
    try:
        return set(weight_map(folder / INDEX_FILE).values()).isdisjoint({SINGLE_FILE})
    except CheckpointError:  # no index, or a damaged one, which is not needed
        return True


def weight_map(index: Path) -> dict[str, str]:
    """Maps tensor names to file names. Raises CheckpointError if the index is damaged or lacks the map."""
    content = json_object(index, read_regular_file(index, MAX_INDEX_BYTES))
    found = content.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index} must have a 'weight_map' from tensor names to file names; download it again")
    for name, file_name in found.items():
        if not isinstance(file_name, str):
            raise CheckpointError(
                f"{index}: the file of the tensor {quoted(name)} must be a string, got {shown(file_name)}"
            )
    return found


def json_object(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in the bytes of a checkpoint's file. Raises CheckpointError for anything else."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(damaged(path, f"its JSON cannot be read ({error})")) from None
    if not isinstance(value, dict):
        raise CheckpointError(damaged(path, f"expected a JSON object, got {shown(value)}"))
    return value


def damaged(path: Path, reason: str) -> str:
    return f"{path} is damaged: {reason}; download it again"
