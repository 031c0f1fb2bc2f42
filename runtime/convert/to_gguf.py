"""Writes a checkpoint as a GGUF file: floats, or blocks of codes with the scales of the least errors.

A weight of the checkpoint is in memory as it is stored, and some of its rows as floats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.convert.gguf_metadata import architecture_name, check_described, metadata_of, rope_factors
from sageLLM.runtime.convert.gguf_tensors import Planned, Types, planned_tensors
from sageLLM.runtime.convert.gguf_vocabulary import vocabulary_of
from sageLLM.runtime.convert.gguf_writer import GgufEntry, GgufWriter
from sageLLM.runtime.convert.source import FLOATS, Progress, Source, out_of_range
from sageLLM.runtime.core.model.formats import Format, QuantMethod, Written
from sageLLM.runtime.core.model.gguf_recipe import TABLES, Recipe
from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.gguf_architectures import ARCHITECTURES, METHOD, ROPE_FACTORS
from sageLLM.runtime.loader.gguf_reader import GgufTensor
from sageLLM.runtime.quantize.blocks import BlockFit
from sageLLM.runtime.quantize.rounding import Rounding
from sageLLM.runtime.quantize.scheme import Scheme
from sageLLM.runtime.registry.plugins import Registry

CHUNK = 2**22
"""Elements that are converted at a time."""
TABLE_FORMAT, TABLE_BITS = "q8_0", 8
"""Tables of tokens have this format in files of fewer bits without a recipe: errors there count in each step."""


QUANTIZATION_VERSION = 2
"""The version of ggml's blocks."""


def gguf_formats(method: QuantMethod) -> dict[str, Format]:
    """The formats that files can be written in, by name."""
    return {one.name: one for one in method.formats if one.name in FLOATS or one.written is not None}


def write_gguf(source: Source, out: Path, form: str, registry: Registry, progress: Progress) -> dict[str, int]:
    """Writes `out` with matrices in the format or recipe `form`; returns the numbers of matrices by format.

    Vectors and routers are float32. Raises CheckpointError for a checkpoint that GGUF files cannot describe.
    """
    encoder = _Encoder(registry)
    recipe = encoder.recipe(form)
    name = architecture_name(source)
    metadata = metadata_of(source, name)
    planned = planned_tensors(source, ARCHITECTURES[name], metadata, encoder.types(recipe))
    entries = {stored: GgufEntry(one.shape, _type(one.format), one.num_bytes) for stored, one in planned.items()}
    factors = rope_factors(source)
    if factors is not None:
        entries[ROPE_FACTORS] = GgufEntry((len(factors),), _type(encoder.formats["float32"]), 4 * len(factors))
    tensors = {stored: GgufTensor(stored, one.shape, one.type, 0) for stored, one in entries.items()}
    if recipe.file_type is not None:
        metadata |= {"general.file_type": recipe.file_type, "general.quantization_version": QUANTIZATION_VERSION}
    metadata |= vocabulary_of(source.folder, source.sizes.V)
    check_described(source, out, metadata, tensors)
    total = sum(entry.num_bytes for entry in entries.values())
    done = 0
    with GgufWriter(out, metadata, entries) as file:
        if factors is not None:
            file.write(ROPE_FACTORS, torch.tensor(factors).view(torch.uint8))
        for stored, one in planned.items():
            for start, blocks in _blocks(source, stored, one, encoder):
                file.write(stored, blocks, start)
                done += blocks.numel()
                progress(done, total)
    return dict(Counter(one.format.name for one in planned.values() if len(one.shape) > 1).most_common())


def _type(format: Format) -> int:
    return int(str(format.when["type"][0]))


def _blocks(source: Source, stored: str, planned: Planned, encoder: _Encoder) -> Iterator[tuple[int, Tensor]]:
    """The bytes of a tensor in chunks, each with its place."""
    for expert, name in planned.sources.items():
        start = (expert or 0) * planned.num_bytes // len(planned.sources)
        weight = planned.moved(source.checkpoint.read(name))
        rows = weight.reshape(-1, planned.shape[-1]) if len(planned.shape) > 1 else weight.reshape(1, -1)
        step = max(1, CHUNK // max(1, rows.shape[1]))
        for low in range(0, rows.shape[0], step):
            values = rows[low : low + step].float()
            blocks = encoder.blocks(planned.format, values + planned.offset if planned.offset else values)
            if blocks is None:
                raise out_of_range(source, name, planned.format.name)
            yield start, blocks
            start += blocks.numel()


class _Encoder:
    """The blocks of formats."""

    def __init__(self, registry: Registry) -> None:
        self._method = registry.methods[METHOD]
        self._values: Mapping[str, Mapping[str, Callable[..., Any]]] = registry.format_values
        self.formats = gguf_formats(self._method)

    def recipe(self, form: str) -> Recipe:
        """The formats of a file that is written with `--format`. Raises CheckpointError for an unknown one."""
        if (found := self._method.recipes.get(form)) is not None:
            return found
        if form not in self.formats:
            known = ", ".join([*self.formats, *self._method.recipes])
            raise CheckpointError(f"--format of a GGUF file must be one of {known}, got {quoted(form)}")
        written = self.formats[form].written
        has_fewer_bits = written is not None and self._bits(written) < TABLE_BITS
        return Recipe(form, {stem: {"all": TABLE_FORMAT} for stem in TABLES} if has_fewer_bits else {})

    def types(self, recipe: Recipe) -> Types:
        by_dtype = {dtype: self.formats[name] for name, dtype in FLOATS.items()}
        return Types(recipe, self.formats, self.formats["float32"], by_dtype)

    def _bits(self, written: Written) -> int:
        assert written.block is not None, "files consist of blocks"
        low, high = written.block.ranges["codes"]
        return (high - low).bit_length()

    def blocks(self, format: Format, values: Tensor) -> Tensor | None:
        """Bytes of values f32[N, K]; None if they are outside of the range of the format."""
        if format.written is None:
            found = values.to(FLOATS[format.name])
            return found.view(torch.uint8) if torch.equal(found.isfinite(), values.isfinite()) else None
        parts = self._parts(format, format.written, values)
        return None if parts is None else self._values[METHOD][f"{format.name}_stored"](**parts)["blocks"]

    def _parts(self, format: Format, written: Written, values: Tensor) -> Mapping[str, Tensor] | None:
        """The codes, scales and other parts of values f32[N, K]."""
        assert written.block is not None, "files consist of blocks"
        if written.rule == "least_squares":
            return BlockFit(written.block, int(format.sizes["B"])).parts(values)
        codes = Rounding(Scheme(format.name, self._method, format, written, {}), torch.float16).nearest(values)
        return {"codes": codes.codes, "scales": codes.scales} if codes.scales.isfinite().all() else None
