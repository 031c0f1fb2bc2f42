"""Weights with a state: a tensor with JSON has the sizes and other facts, and the other tensors are stored flat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.core.model.formats import Format, StoredPart
from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.loader.format_choice import setting
from sageLLM.runtime.loader.safetensors_reader import Checkpoint, TensorInfo

MAX_STATE_BYTES = 2**16
MAX_SIZE = 2**31
TABLE_SIZE = 256


class StateError(ValueError):
    """A state that does not describe its weight; the message names the tensor and the fact."""


@dataclass(frozen=True, slots=True)
class State:
    """The facts of a weight, and the name of the tensor that has them."""

    name: str
    facts: Mapping[str, Any]

    def whole(self, key: str) -> int:
        """A number above 0. Raises StateError."""
        value = setting(self.facts, key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_SIZE:
            raise self.error(f"'{key}' must be a number above 0, got {value!r:.40}")
        return value

    def real(self, key: str) -> float:
        """A finite number. Raises StateError."""
        value = setting(self.facts, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise self.error(f"'{key}' must be a number, got {value!r:.40}")
        return float(value)

    def error(self, text: str) -> StateError:
        return StateError(f"tensor {quoted(self.name)}: {text}")


def names_beside(module: str, format: Format, stored: Checkpoint) -> list[str]:
    """The names of the state and of tables and scales of nested tensors, as far as they are stored."""
    ends = [*format.state, *(end for one in format.nested.values() for end in (one.table, one.scales))]
    return [name for end in ends if (name := format.stored_name(module, end)) in stored]


def read_state(module: str, format: Format, stored: Checkpoint) -> State:
    """The state of a weight. Raises StateError."""
    names = [format.stored_name(module, end) for end in format.state]
    name = next((one for one in names if one in stored), None)
    if name is None:
        raise StateError(f"missing tensor {' or '.join(map(repr, names))} of the format {format.name}")
    info = stored.info(name)
    if info.dtype != torch.uint8 or len(info.shape) != 1 or not 0 < info.shape[0] <= MAX_STATE_BYTES:
        raise StateError(f"tensor {quoted(name)} must be the bytes of a JSON object, up to {MAX_STATE_BYTES}")
    try:
        found = json.loads(bytes(stored.read(name).tolist()))
    except (ValueError, RecursionError) as error:
        raise StateError(f"tensor {quoted(name)} must be the bytes of a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise StateError(f"tensor {quoted(name)} must be the bytes of a JSON object, got a {type(found).__name__}")
    return State(name, found)


def sizes_of(state: State, format: Format) -> dict[str, int]:
    """The sizes that the state has: rows of whole blocks. Raises StateError."""
    sizes = {size: state.whole(key) for size, key in format.state_sizes.items()}
    used = {term for part in format.tensors for extent in part.dims if extent.dim == "K" for term in extent.over}
    for term in sorted(used, key=str):
        count = sizes[term] if isinstance(term, str) else term
        if sizes["K"] % count:
            text = f"rows of {sizes['K']} inputs are not whole blocks of {count}, which is not supported"
            raise state.error(text)
    return sizes


def is_nested(format: Format, part: StoredPart, info: TensorInfo) -> bool:
    """Whether a tensor of floats is stored as bytes."""
    return part.name in format.nested and info.dtype == torch.uint8


def flat_problems(
    module: str, format: Format, sizes: Mapping[str, int], names: Mapping[str, str], state: State, stored: Checkpoint
) -> list[str]:
    """What is wrong with the numbers of elements of the tensors, and with those that are stored as bytes."""
    problems: list[str] = []
    for part in format.tensors:
        info, count = stored.info(names[part.name]), prod(extent.size(sizes) for extent in part.dims)
        if prod(info.shape) != count:
            text = f"expected {count} elements for {part}, by its state"
            problems.append(f"tensor {quoted(info.name)}: {text}, got {list(info.shape)}")
        elif is_nested(format, part, info):
            problems += _nested_problems(module, format, part.name, count, state, stored)
    return problems


def _nested_problems(module: str, format: Format, part: str, count: int, state: State, stored: Checkpoint) -> list[str]:
    nested = format.nested[part]
    names = [format.stored_name(module, end) for end in (nested.table, nested.scales)]
    if missing := [name for name in names if name not in stored]:
        return [f"missing tensor '{missing[0]}' of the format {format.name}, as its '{part}' has bytes"]
    try:
        block, _ = state.whole(nested.block), state.real(nested.offset)
        if block & (block - 1):  # the number of blocks may be that of another size
            raise state.error(f"'{nested.block}' must be a power of two, got {block}")
    except StateError as error:
        return [str(error)]
    expected = (TABLE_SIZE, -(-count // block))
    return [
        f"tensor {quoted(one)}: expected {size} numbers in float32, got {list(stored.info(one).shape)}"
        for one, size in zip(names, expected, strict=True)
        if stored.info(one).dtype != torch.float32 or prod(stored.info(one).shape) != size
    ]


def with_dims(
    module: str,
    format: Format,
    sizes: Mapping[str, int],
    tensors: Mapping[str, Tensor],
    state: State,
    stored: Checkpoint,
) -> dict[str, Tensor]:
    """The flat tensors with the dims of the format; bytes as the floats that they stand for."""
    found = {}
    for part in format.tensors:
        tensor = tensors[part.name]
        if part.name in format.nested and not tensor.is_floating_point():
            tensor = _nested_values(module, format, part.name, tensor.flatten(), state, stored)
        found[part.name] = tensor.reshape([extent.size(sizes) for extent in part.dims])
    return found


def _nested_values(module: str, format: Format, part: str, codes: Tensor, state: State, stored: Checkpoint) -> Tensor:
    """f32[n]: table[byte] * scale + offset, each rounded."""
    nested = format.nested[part]
    table, scales = (stored.read(format.stored_name(module, end)).flatten() for end in (nested.table, nested.scales))
    by_byte = scales.repeat_interleave(state.whole(nested.block))[: len(codes)]
    return table[codes.int()] * by_byte + torch.tensor(state.real(nested.offset), dtype=torch.float32)
