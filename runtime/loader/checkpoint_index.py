"""Reads model.safetensors.index.json: which tensors a checkpoint has, and the file of each."""

import json
from pathlib import Path
from typing import Any

from sageLLM.runtime.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 * 2**20


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name; CheckpointError where the index says nothing of the kind."""
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{index} has more than {MAX_INDEX_BYTES} bytes")
        content = json_object(index, index.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from None
    found = content.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index} has no 'weight_map' from tensor names to file names")
    for name, file_name in found.items():
        if not isinstance(file_name, str):
            raise CheckpointError(f"{index}: the file of the tensor {name!r} must be a string")
    return found


def json_object(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in the bytes of a checkpoint's file."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(damaged(path, f"its JSON cannot be read ({error})")) from None
    if not isinstance(value, dict):
        raise CheckpointError(damaged(path, "its JSON is no object"))
    return value


def damaged(path: Path, why: str) -> str:
    return f"{path} is damaged: {why}; download it again"
