"""Schemes of `sagellm quantize --format`, as the formats of `specs/formats` declare them: names, settings and sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.core.model.formats import Extent, Format, QuantMethod, Setting, Written
from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.errors import CheckpointError

GROUPS = range(8, 4097)
"""Sizes in names of schemes."""
_HOLE = re.compile(r"\\\{(\w+)\\\}")


def scheme_names(methods: Mapping[str, QuantMethod]) -> list[str]:
    """The names of all schemes that checkpoints can be written in, with sizes as `{G}`."""
    return [name for _, one in _written(methods) for name in one.schemes]


@dataclass(frozen=True, slots=True)
class Grid:
    """The weights that share a scale: `rows` outputs and `columns` inputs."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Scheme:
    """A format to write, with the values of its settings."""

    name: str
    method: QuantMethod
    format: Format
    written: Written
    values: Mapping[str, Setting | tuple[int, ...]]

    @classmethod
    def parse(cls, text: str, methods: Mapping[str, QuantMethod]) -> Scheme:
        """`int8`, or `int4-g128`. Raises CheckpointError."""
        for method in methods.values():
            for format in method.formats if method.quant_method is not None else ():
                written = format.written
                for name, settings in written.schemes.items() if written is not None else ():
                    if (found := re.fullmatch(_HOLE.sub(r"(?P<\1>[1-9]\\d{0,4})", re.escape(name)), text)) is not None:
                        assert written is not None, "it has the name"
                        sizes = {str(format.sizes[key]): int(size) for key, size in found.groupdict().items()}
                        _check_sizes(text, sizes)
                        return cls(text, method, format, written, _settings(format, {**settings, **sizes}))
        known = ", ".join(scheme_names(methods)).replace("{", "").replace("}", "")
        raise CheckpointError(f"--format must be one of {known}, got {quoted(text)}")

    @property
    def bits(self) -> int:
        """The width of the codes; 8 for float8."""
        sizes = self._sizes
        return 8 if self.written.kind in ("i8", "f8") else int(sizes.get(self.written.kind) or self.written.kind)

    @property
    def _sizes(self) -> dict[str, int | None]:
        """The sizes of the format; None is the number of inputs."""
        found: dict[str, int | None] = {}
        for name, key in self.format.sizes.items():
            value = _at(self.values, key) if isinstance(key, str) else key
            found[name] = value if isinstance(value, int) and value != -1 else None
        return found

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """The sizes of the format and of a weight [N, K]."""
        rows, width = shape
        return {**{name: width if size is None else size for name, size in self._sizes.items()}, "N": rows, "K": width}

    def grid(self, shape: tuple[int, ...]) -> Grid:
        """The weights [N, K] that share a scale."""
        sizes = self.sizes(shape)
        if self.written.block is not None:
            return Grid(1, self.written.block.group)
        dims = next(part.dims for part in self.format.tensors if part.name == self.written.scale)
        granules = {extent.dim: extent.granule(sizes) for extent in dims}
        return Grid(granules.get("N", shape[0]), granules.get("K", shape[1]))

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """The reason why a weight [N, K] cannot be written: groups and words must be whole."""
        sizes = self.sizes(shape)
        grid = self.grid(shape)
        if self.written.kind != "f8" and shape[1] % grid.columns:
            return f"its {shape[1]} inputs are not whole groups of {grid.columns}"
        for part in self.format.tensors:
            for extent in part.dims:
                if extent.times or extent.over:
                    granule = _granule(extent, sizes)
                    if self.written.kind != "f8" and sizes[extent.dim] % granule:
                        return f"'{part.name}' requires multiples of {granule}"
        return None

    def section(self, ignored: list[str]) -> dict[str, Any]:
        """The section `quantization_config`."""
        method = self.method
        nested: dict[str, Any] = {}
        for key, value in self.values.items():
            place = nested
            *sections, last = key.split(".")
            for name in sections:
                place = place.setdefault(name, {})
            place[last] = list(value) if isinstance(value, tuple) else value
        found: dict[str, Any] = {"quant_method": method.quant_method, **method.writes}
        if method.groups is not None:
            group = {"targets": ["Linear"], **nested, "input_activations": None, "output_activations": None}
            found |= {key: value for key, value in nested.items() if not isinstance(value, dict)}
            found[method.groups] = {"group_0": group}
        else:
            found |= nested
        return {**found, method.skip[0]: ignored} if method.skip else found

    def stored(
        self, values: Mapping[str, Mapping[str, Callable[..., Any]]], codes: Tensor, *parts: Tensor
    ) -> dict[str, Tensor]:
        """The stored tensors by the ends of their names, from codes [N, K] and scales, and zeros, of groups."""
        function = values[self.method.name][f"{self.format.name}_stored"]
        sizes = self.sizes(tuple(codes.shape))
        used = {name: size for name, size in sizes.items() if name in function.__annotations__}
        found: dict[str, Tensor] = function(codes, *parts, **used)
        if self.written.shape is not None:
            found[self.written.shape] = torch.tensor(codes.shape)
        return found

    def entries(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The types and shapes of the stored tensors of a weight [N, K], whose scales have the type `dtype`."""
        sizes = self.sizes(shape)
        found = {
            part.name: (_DTYPES.get(part.element, dtype), tuple(one.size(sizes) for one in part.dims) or (1,))
            for part in self.format.tensors
        }
        return found if self.written.shape is None else {**found, self.written.shape: (torch.int64, (2,))}


_DTYPES = {
    "i32": torch.int32,
    "i8": torch.int8,
    "u8": torch.uint8,
    "f8": torch.float8_e4m3fn,
    "f16": torch.float16,
    "f32": torch.float32,
}


def _written(methods: Mapping[str, QuantMethod]) -> list[tuple[Format, Written]]:
    """The formats of checkpoint folders that can be written."""
    formats = (one for method in methods.values() if method.quant_method is not None for one in method.formats)
    return [(one, one.written) for one in formats if one.written is not None]


def _check_sizes(name: str, sizes: Mapping[str, int]) -> None:
    for size in sizes.values():
        if size not in GROUPS or size % 8:
            raise CheckpointError(
                f"--format {name}: groups must be multiples of 8, up to {GROUPS[-1]} inputs, got {size}"
            )


def _settings(format: Format, chosen: Mapping[str, Setting | tuple[int, ...]]) -> dict[str, Setting | tuple[int, ...]]:
    """The settings that select the format: chosen values, and elsewhere the first that is not null."""
    found: dict[str, Setting | tuple[int, ...]] = {}
    for key, values in format.when.items():
        value = next((one for one in values if one is not None), None)
        name = key.split("|")[0]
        if key in chosen:
            found[name] = chosen[key]
        elif (value is not None and None not in values) or (value is not None and isinstance(value, bool)):
            found[name] = value
    return found | {key.split("|")[0]: value for key, value in chosen.items() if key not in format.when}


def _at(values: Mapping[str, Setting | tuple[int, ...]], key: str) -> object:
    """The value of a key such as `weights.block_structure.0`, or of the first name of `a|b`."""
    name = key.split("|")[0]
    if name in values:
        return values[name]
    head, _, last = name.rpartition(".")
    items = values.get(head)
    return items[int(last)] if isinstance(items, tuple) and last.isdigit() and int(last) < len(items) else None


def _granule(extent: Extent, sizes: Mapping[str, int]) -> int:
    """The elements of the dim that fill whole elements of the tensor."""
    return extent.granule(sizes)
