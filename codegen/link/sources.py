"""Links the sources of weights: resolves each source to checkpoint tensors and the regions of the weight they fill.

Sources nest: names, `concat`, `stack`, `transpose` and `rearrange` all become parts, each of which is one tensor,
reshaped, sliced, permuted and placed at an offset. Sizes are compared symbolically, so a match holds for every config.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sageLLM.codegen.diagnostics import did_you_mean
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.link.rearrange import link_rearrange
from sageLLM.codegen.link.sizes import SizeLinker, YamlPath
from sageLLM.codegen.model.source import PartDef
from sageLLM.codegen.schema.sources import HfSource, Source, StackSpec

_OVER = re.compile(r"e in ([A-Za-z][A-Za-z0-9_]*)\Z")


@dataclass(frozen=True, slots=True)
class SourceLinker:
    """Resolves the source of one weight; `prefix` is the block's prefix of tensor names."""

    linker: SizeLinker
    prefix: str

    def parts(self, source: Source, dims: tuple[Size, ...], path: YamlPath) -> tuple[PartDef, ...]:
        """The parts that fill a value of `dims`; raises Refused after a finding."""
        if isinstance(source, str):
            return (PartDef.whole(self.prefix + source, dims),)
        if source.concat is not None:
            return self._concat(source, dims, path)
        if source.stack is not None:
            return self._stack(source.stack, dims, (*path, "stack"))
        if source.transpose is not None:
            parts = self._transpose(source.transpose, dims, (*path, "transpose"))
            return tuple(replace(part, is_either=source.either) for part in parts)
        return (link_rearrange(self.linker, source, dims, f"{self.prefix}{source.of}", path),)

    def _concat(self, source: HfSource, dims: tuple[Size, ...], path: YamlPath) -> tuple[PartDef, ...]:
        name, dim = self.linker.name, source.dim
        if dim >= len(dims):
            message = f"the dim of `concat` must be 0 to {len(dims) - 1} for '{name}', got {dim}"
            raise self.linker.refuse(message, (*path, "dim"), "count dims from 0")
        pieces = list(self._pieces(source, path))
        total = sum((size for _, size, _ in pieces), Size.of(0))
        if total != dims[dim]:
            message = f"the sizes of `concat` must add up to dim {dim} of '{name}': expected {dims[dim]}, got {total}"
            raise self.linker.refuse(message, (*path, "concat"), "change a size, or the shape")
        parts: list[PartDef] = []
        start = Size.of(0)
        for inner, size, inner_path in pieces:
            found = self.parts(inner, (*dims[:dim], size, *dims[dim + 1 :]), inner_path)
            parts += [part.moved(dim, start) for part in found]
            start = size if not start.terms else start + size
        return tuple(parts)

    def _pieces(self, source: HfSource, path: YamlPath) -> Iterator[tuple[Source, Size, YamlPath]]:
        """(source, size, path) of each concatenated source."""
        if isinstance(source.concat, dict):
            for hf, size in source.concat.items():
                yield hf, self.linker.size(size, (*path, "concat", hf)), (*path, "concat", hf)
            return
        for i, item in enumerate(source.concat or ()):
            at = (*path, "concat", i)
            yield item.of, self.linker.size(item.size, (*at, "size")), (*at, "of")

    def _stack(self, stack: StackSpec, dims: tuple[Size, ...], path: YamlPath) -> tuple[PartDef, ...]:
        found = _OVER.match(stack.over)
        count = found[1] if found else ""
        parts = self.parts(stack.of, dims[1:], (*path, "of"))
        unnamed = [part.hf for part in parts if "{e}" not in part.hf]
        if not self.linker.is_size(count) or unnamed:
            shown = unnamed[0] if unnamed else parts[0].hf
            message = f"`stack` must have `over: e in COUNT` and a name with {{e}}, got '{stack.over}' and '{shown}'"
            raise self.linker.refuse(message, path, did_you_mean(count, self.linker.config))
        if not dims or dims[0] != Size.symbol(count):
            name = self.linker.name
            message = f"dim 0 of '{name}' must be {count}, the number of stacked tensors"
            raise self.linker.refuse(message + (f", got {dims[0]}" if dims else ""), ("shape", 0), f"write {count}")
        if any(part.stacked is not None for part in parts):
            raise self.linker.refuse("`stack` must not be nested", path, "stack once, over one count")
        return tuple(part.stacked_over(count) for part in parts)

    def _transpose(self, source: Source, dims: tuple[Size, ...], path: YamlPath) -> tuple[PartDef, ...]:
        if len(dims) < 2:
            message = f"a transposed weight must have at least 2 dims, got {len(dims)} for '{self.linker.name}'"
            raise self.linker.refuse(message, ("shape",), "write both sizes, or remove `transpose`")
        inner = self.parts(source, (*dims[:-2], dims[-1], dims[-2]), path)
        return tuple(part.transposed() for part in inner)
