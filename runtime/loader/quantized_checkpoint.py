"""A quantised checkpoint as one with float weights: stored tensors become weights, which are computed when read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.core.model.formats import Format, StoredPart
from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.kernels.cpu.coded import CodedWeight
from sageLLM.runtime.loader.codes import coded, why_not_coded
from sageLLM.runtime.loader.dequantize import dequantize
from sageLLM.runtime.loader.flat_weights import (
    State,
    StateError,
    flat_problems,
    is_nested,
    names_beside,
    read_state,
    sizes_of,
    with_dims,
)
from sageLLM.runtime.loader.format_choice import Choice, Quantized, is_listed
from sageLLM.runtime.loader.kv_form import is_kv_scale
from sageLLM.runtime.loader.safetensors_reader import Checkpoint, TensorInfo

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ELEMENTS: Mapping[str, tuple[torch.dtype, ...]] = {
    "u8": (torch.uint8, torch.float8_e8m0fnu, torch.int8),
    "i8": (torch.int8,),
    "i32": (torch.int32, torch.uint32),
    "i64": (torch.int64,),
    "f8": (torch.float8_e4m3fn,),
    "f16": (torch.float16,),
    "bf16": (torch.bfloat16,),
    "f32": (torch.float32,),
    "float": FLOATS,
}
MAX_PROBLEMS = 20
Values = Mapping[str, Mapping[str, Callable[..., Any]]]


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight of a module that is stored in a format: its sizes, the names of its tensors, and its state if any."""

    module: str
    format: Format
    sizes: Mapping[str, int]
    names: Mapping[str, str]
    state: State | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[dim] for dim in self.format.weight)


class QuantizedCheckpoint(Checkpoint):
    """The tensors of `stored`, with weights in place of the tensors of their formats.

    Raises CheckpointError for missing scales, and tensors with other types or shapes than their format.
    """

    def __init__(self, stored: Checkpoint, quantized: Quantized, values: Values) -> None:
        self.quantized, self._stored, self._values = quantized, stored, values[quantized.method.name]
        self.weights: dict[str, QuantizedWeight] = {}
        hidden = {name for name in stored if is_kv_scale(name)}
        problems: list[str] = []
        for module, choice in _modules(stored.names, quantized).items():
            names = _names(module, choice.format, stored)
            if _is_plain(names, choice.format, stored):
                continue
            hidden |= {*names.values(), *_unused(module, choice.format, stored)}
            hidden |= {*names_beside(module, choice.format, stored)}
            found = described(module, choice, names, stored, quantized)
            if isinstance(found, QuantizedWeight):
                self.weights[module + choice.format.suffix] = found
            else:
                problems += found
        problems += _odd_modules(self.weights, [name for name in stored if name not in hidden], quantized)
        if not problems and not self.weights:
            problems = [f"no weight is quantised, although {quantized.source} says so; remove it to load float weights"]
        if problems:
            more = f"\n  and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
            lines = "".join(f"\n  {one}" for one in problems[:MAX_PROBLEMS])
            text = f": {problems[0]}" if len(problems) == 1 else f":{lines}{more}"
            raise CheckpointError(f"{stored.folder} does not match its format '{quantized.method.name}'{text}")
        infos = {name: stored.info(name) for name in stored if name not in hidden}
        infos |= {name: self._info(name, weight) for name, weight in self.weights.items()}
        super().__init__(stored.folder, infos)

    def read(self, name: str, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor; a quantised one is computed in `dtype`, by default float32."""
        if (weight := self.weights.get(name)) is None:
            return self._stored.read(name, rows)
        tensors = self._tensors(weight)
        function = self._values[weight.format.name]
        found = dequantize(weight.format, function, tensors, weight.sizes, dtype or torch.float32)
        return found if rows is None else found[rows]

    @property
    def is_quantized(self) -> bool:
        return True

    @property
    def declared_activations(self) -> str | None:
        return next((one.activations for one in self.quantized.choices if one.activations), None)

    def read_codes(self, name: str, dtype: torch.dtype) -> CodedWeight | str | None:
        if (weight := self.weights.get(name)) is None:
            return None
        tensors = self._tensors(weight)
        if (reason := why_not_coded(weight.format, tensors, weight.sizes)) is not None:
            return reason
        return coded(weight.format, self._values[f"{weight.format.name}_codes"], tensors, weight.sizes, dtype)

    def _tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The stored tensors with the dims of the format."""
        found = {key: _signed(self._stored.read(name)) for key, name in weight.names.items()}
        if weight.state is None:
            return found
        return with_dims(weight.module, weight.format, weight.sizes, found, weight.state, self._stored)

    def close(self) -> None:
        self._stored.close()

    def _info(self, name: str, weight: QuantizedWeight) -> TensorInfo:
        """The type is that of the scales, if these are floats."""
        infos = [self._stored.info(stored) for stored in weight.names.values()]
        dtype = next((info.dtype for info in infos if info.dtype in FLOATS), torch.bfloat16)
        return TensorInfo(name, weight.shape, dtype, infos[0].file)


def _signed(tensor: Tensor) -> Tensor:
    """Words of 32 bits as int32, which torch has operators for."""
    return tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor


def _modules(names: Iterable[str], quantized: Quantized) -> dict[str, Choice]:
    """The modules with a tensor of their format."""
    found: dict[str, Choice] = {}
    for name in names:
        for ends in {(one.format.separator, part.end) for one in quantized.choices for part in one.format.tensors}:
            module = name.removesuffix("".join(ends))
            if module != name and (choice := quantized.choice(module)) is not None:
                found.setdefault(module, choice)
    return found


def _names(module: str, format: Format, stored: Checkpoint) -> dict[str, str]:
    """The names of the tensors that are stored, by those in the format."""
    names = {part.name: format.stored_name(module, part.end) for part in format.tensors}
    return {key: name for key, name in names.items() if name in stored}


def _is_plain(names: Mapping[str, str], format: Format, stored: Checkpoint) -> bool:
    """Whether only a float weight is stored, as of norms, or tensors of a name that the format does not have."""
    own = {key: name for key, name in names.items() if f".{key}" != format.suffix}
    return not own and all(stored.info(name).dtype in (*FLOATS, torch.float64) for name in names.values())


def _unused(module: str, format: Format, stored: Checkpoint) -> list[str]:
    names = (format.stored_name(module, name) for name in format.unused)
    return [name for name in names if name in stored]


def described(
    module: str, choice: Choice, names: Mapping[str, str], stored: Checkpoint, quantized: Quantized
) -> QuantizedWeight | list[str]:
    """The weight of a module, or the differences between its tensors and those of its format, a sentence each."""
    format = choice.format
    if is_listed(module, quantized.skipped):
        return [f"{quoted(module)} is quantised, although '{quantized.skip}' lists it in {quantized.source}"]
    missing = [format.stored_name(module, part.end) for part in format.tensors if part.name not in names]
    if missing:
        return [f"missing tensor '{name}' of the format {format.name}" for name in missing]
    infos = {part.name: stored.info(names[part.name]) for part in format.tensors}
    problems = [
        f"tensor {quoted(info.name)} must be {_element(part)}, got {str(info.dtype).removeprefix('torch.')}"
        for part in format.tensors
        if (info := infos[part.name]).dtype not in ELEMENTS[part.element] and not is_nested(format, part, info)
    ]
    if problems:
        return problems
    if format.state:
        return _flat(module, choice, names, stored)
    wrong_ranks = [part for part in format.tensors if not _has_rank(part, infos[part.name].shape)]
    if wrong_ranks:
        return [_wrong_shape(part, infos[part.name], str(part)) for part in wrong_ranks]
    sizes = _sizes(choice, names, stored)
    expected = {part.name: tuple(extent.size(sizes) for extent in part.dims) for part in format.tensors}
    return [
        _wrong_shape(part, infos[part.name], f"[{', '.join(map(str, expected[part.name]))}]")
        for part in format.tensors
        if part.dims and infos[part.name].shape != expected[part.name]
    ] or QuantizedWeight(module, format, sizes, names)


def _flat(module: str, choice: Choice, names: Mapping[str, str], stored: Checkpoint) -> QuantizedWeight | list[str]:
    """As `described`, for a weight whose sizes are those of its state."""
    try:
        state = read_state(module, choice.format, stored)
        sizes = {name: size for name, size in choice.sizes.items() if size is not None}
        sizes |= sizes_of(state, choice.format)
    except StateError as error:
        return [str(error)]
    problems = flat_problems(module, choice.format, sizes, names, state, stored)
    return problems or QuantizedWeight(module, choice.format, sizes, names, state)


def _has_rank(part: StoredPart, shape: tuple[int, ...]) -> bool:
    return len(shape) == len(part.dims) if part.dims else shape in ((), (1,))


def _wrong_shape(part: StoredPart, info: TensorInfo, expected: str) -> str:
    return f"tensor {quoted(info.name)}: expected {expected} for {part}, got {list(info.shape)}"


def _element(part: StoredPart) -> str:
    return "float16, bfloat16 or float32" if part.element == "float" else str(ELEMENTS[part.element][0])[6:]


def _sizes(choice: Choice, names: Mapping[str, str], stored: Checkpoint) -> dict[str, int]:
    """The sizes of the format and of the weight: from whole dims, else the largest that the stored sizes allow."""
    sizes = {name: size for name, size in choice.sizes.items() if size is not None}
    whole = {name for name, size in choice.sizes.items() if size is None}
    extents = [
        (extent, size)
        for part in choice.format.tensors
        for extent, size in zip(part.dims, stored.info(names[part.name]).shape, strict=bool(part.dims))
    ]
    for extent, size in extents:
        if extent.is_whole and extent.dim in choice.format.weight:
            sizes.setdefault(extent.dim, size)
    known = [(extent, size) for extent, size in extents if extent.is_known(sizes)]
    for dim in choice.format.weight:
        finest = [(extent.granule(sizes), extent.most(size, sizes)) for extent, size in known if extent.dim == dim]
        if dim not in sizes:
            sizes[dim] = min(finest, default=(1, 0))[1]
    return {**sizes, **dict.fromkeys(whole, sizes["K"] or 1)}


def _odd_modules(weights: Iterable[str], others: Iterable[str], quantized: Quantized) -> list[str]:
    """Modules with float weights that are quantised in other layers, and are not listed."""
    kinds = {_kind(name): name for name in weights}
    found = []
    for name in others:
        other = kinds.get(_kind(name))
        module = name.removesuffix(".weight")
        if other is not None and not is_listed(module, quantized.skipped):
            place = f"'{quantized.skip}' in {quantized.source} does not list it" if quantized.skip else "not listed"
            found.append(f"tensor {quoted(name)} is not quantised, unlike {quoted(other)}, and {place}")
    return found


def _kind(name: str) -> str:
    """The name without numbers, equal for all layers and experts."""
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))
