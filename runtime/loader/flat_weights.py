"""Weights with a state: their tensors are stored flat, and a tensor with JSON has the sizes and other facts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.core.model.formats import Format, Nested
from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.loader.format_choice import STATE, is_of_state, setting
from sageLLM.runtime.loader.safetensors_reader import Checkpoint

MAX_STATE_BYTES = 2**16
MAX_SIZE = 2**31
TABLE_SIZE = 256
State = Mapping[str, Any]


class StateError(ValueError):
    """A state that does not describe its weight; the message names the tensor and the fact."""


def state_name(module: str, format: Format) -> str:
    """The name of the tensor with the state."""
    return f"{module}{format.separator}{format.state}"


def read_state(name: str, stored: Checkpoint) -> State:
    """The facts of a tensor with JSON. Raises StateError."""
    info = stored.info(name)
    if info.dtype != torch.uint8 or len(info.shape) != 1 or not 0 < info.shape[0] <= MAX_STATE_BYTES:
        raise StateError(f"tensor {quoted(name)} must be the bytes of a JSON object, up to {MAX_STATE_BYTES}")
    try:
        found = json.loads(bytes(stored.read(name).tolist()))
    except (ValueError, RecursionError) as error:
        raise StateError(f"tensor {quoted(name)} must be the bytes of a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise StateError(f"tensor {quoted(name)} must be the bytes of a JSON object, got a {type(found).__name__}")
    return found


def sizes_of(name: str, state: State, format: Format) -> dict[str, int]:
    """The sizes that the state has: rows of whole blocks. Raises StateError."""
    keys = {size: key for size, key in format.sizes.items() if is_of_state(key)}
    sizes = {size: _whole(name, state, str(key)) for size, key in keys.items()}
    used = {term for part in format.tensors for extent in part.dims if extent.dim == "K" for term in extent.over}
    for term in sorted(used, key=str):
        count = sizes[term] if isinstance(term, str) else term
        if sizes["K"] % count:
            message = f"tensor {quoted(name)}: rows of {sizes['K']} inputs are not whole blocks of {count}"
            raise StateError(f"{message}, which is not supported")
    return sizes


def _whole(name: str, state: State, key: str) -> int:
    key = key.removeprefix(STATE)
    value = setting(state, key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_SIZE:
        raise StateError(f"tensor {quoted(name)}: '{key}' must be a number above 0, got {value!r:.40}")
    return value


def nested_names(module: str, format: Format, nested: Nested) -> tuple[str, str]:
    """The names of the table and of the scales of a tensor that is stored as bytes."""
    return f"{module}{format.separator}{nested.table}", f"{module}{format.separator}{nested.scales}"


def problems_of_nested(
    module: str, format: Format, part: str, count: int, state: State, stored: Checkpoint
) -> list[str]:
    """What is wrong with the table, the scales and the facts of `count` floats that are stored as bytes."""
    nested = format.nested[part]
    names = nested_names(module, format, nested)
    if missing := [name for name in names if name not in stored]:
        return [f"missing tensor '{missing[0]}' of the format {format.name}, as its '{part}' has bytes"]
    name = state_name(module, format)
    try:
        block, _ = _whole(name, state, nested.block), _offset(name, state, nested)
    except StateError as error:
        return [str(error)]
    expected = (TABLE_SIZE, -(-count // block))
    return [
        f"tensor {quoted(one)}: expected {size} numbers in float32, got {list(stored.info(one).shape)}"
        for one, size in zip(names, expected, strict=True)
        if stored.info(one).dtype != torch.float32 or prod(stored.info(one).shape) != size
    ]


def _offset(name: str, state: State, nested: Nested) -> float:
    key = nested.offset.removeprefix(STATE)
    value = setting(state, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise StateError(f"tensor {quoted(name)}: '{key}' must be a number, got {value!r:.40}")
    return float(value)


def nested_values(codes: Tensor, table: Tensor, scales: Tensor, state: State, nested: Nested) -> Tensor:
    """The floats that are stored as bytes, f32[n]: table[byte] * scale + offset, each rounded."""
    block, offset = setting(state, nested.block.removeprefix(STATE)), setting(state, nested.offset.removeprefix(STATE))
    values = table.flatten()[codes.flatten().int()]
    return values * scales.flatten().repeat_interleave(block)[: len(values)] + torch.tensor(offset, dtype=torch.float32)
