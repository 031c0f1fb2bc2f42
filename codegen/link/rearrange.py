"""Links `rearrange`: a tensor split into axes that are reordered and merged, in the notation of einops.

    {rearrange: "(Nkv g D) H -> (Nkv g D) H", of: query_key_value.weight, sizes: {g: G + 2}, take: {g: "0:G"}}

An axis is a config size or an entry of `sizes`. Each side names every axis once; an axis of which `take` reads a
single index is omitted on the right. `1` is an axis of size 1, on either side: `"1 ->"` fills a single number.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sageLLM.codegen.diagnostics import did_you_mean
from sageLLM.codegen.expr.size import Size, volume
from sageLLM.codegen.link.sizes import SizeLinker, YamlPath
from sageLLM.codegen.model.source import PartDef
from sageLLM.codegen.schema.sources import HfSource

_SIDE = re.compile(r"\s*(?:(?:\w+|\(\s*\w+(?:\s+\w+)*\s*\))\s*)*\Z")
_ONE = "1"
_AXIS = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z")
_MAX_AXES = 8
Names = tuple[tuple[str, ...], ...]


def link_rearrange(linker: SizeLinker, source: HfSource, dims: tuple[Size, ...], hf: str, path: YamlPath) -> PartDef:
    """The part that fills `dims`; raises Refused after a finding."""
    return _Rearrange(linker, source, path).link(dims, hf)


@dataclass(frozen=True, slots=True)
class _Rearrange:
    linker: SizeLinker
    source: HfSource
    path: YamlPath

    def link(self, dims: tuple[Size, ...], hf: str) -> PartDef:
        left, right = self._sides()
        axes = [name for group in left for name in group]
        sizes = {name: self._axis_size(name) for name in axes}
        take = {name: self._range(name, text, sizes) for name, text in self._taken.items()}
        self._check_names(axes, right)
        index = {name: axis for axis, name in enumerate(axes)}
        part = PartDef(
            hf=hf,
            shape=tuple(volume(sizes[name] for name in group) for group in left),
            axes=tuple(sizes.values()),
            groups=tuple(tuple(index[name] for name in group) for group in right),
            at=(Size.of(0),) * len(right),
            take=tuple((index[name], start, stop) for name, (start, stop) in take.items()),
        )
        if part.size != dims:
            message = f"'{self.linker.name}': expected the shape {_shape(dims)}, got {_shape(part.size)}"
            raise self._refuse(message, "group the axes of each dim in parentheses, outermost first", "SAGE211")
        return part

    @property
    def _taken(self) -> dict[str, str]:
        return {name: str(text) for name, text in self.source.take.items()}

    def _sides(self) -> tuple[Names, Names]:
        sides = str(self.source.rearrange).split("->")
        if len(sides) != 2 or not all(_SIDE.match(side) for side in sides):
            message = f"expected axes before and after `->`, got '{self.source.rearrange}'"
            raise self._refuse(message, 'write for example "(n c d) h -> (c n d) h"')
        left, right = (
            tuple(tuple(group.strip("()").split()) for group in re.findall(r"\w+|\([^)]*\)", side)) for side in sides
        )
        if sum(map(len, left)) > _MAX_AXES:
            raise self._refuse(f"a tensor may be split into at most {_MAX_AXES} axes", "merge axes that stay adjacent")
        if any(_ONE in group and len(group) > 1 for group in (*left, *right)):
            raise self._refuse("an axis `1` must not be in parentheses", "leave it out of the group")
        # On the left, `1` is an axis that no dim contains; on the right, a dim without axes.
        numbered = tuple((f"{_ONE} {at}",) if group == (_ONE,) else group for at, group in enumerate(left))
        return numbered, tuple(() if group == (_ONE,) else group for group in right)

    def _axis_size(self, name: str) -> Size:
        if name.startswith(_ONE):
            return Size.of(1)
        if name in self.source.sizes:
            if name in self.linker.config:
                message = f"the axis '{name}' must not have the name of a config value"
                raise self._refuse(message, "rename the axis", "SAGE217", "sizes", name)
            return self.linker.size(self.source.sizes[name], (*self.path, "sizes", name))
        if not self.linker.is_size(name):
            known = [*self.source.sizes, *(size for size in self.linker.config if self.linker.is_size(size))]
            near = did_you_mean(name, known) or ""
            help = near if near.startswith("did") else f"write `sizes: {{{name}: SIZE}}`, or use a size of the config"
            message = f"the axis '{name}' must be a config size or have a size under `sizes`"
            raise self._refuse(message, help if _AXIS.match(name) else "begin its name with a letter")
        return Size.symbol(name)

    def _range(self, name: str, text: str, sizes: Mapping[str, Size]) -> tuple[Size, Size]:
        """The range [start, stop) of an axis, which must be inside the axis for every config."""
        if name not in sizes:
            raise self._refuse(f"unknown axis '{name}'", did_you_mean(name, sizes), "SAGE217", "take")
        first, colon, last = text.partition(":")
        at = (*self.path, "take", name)
        start = self.linker.size(first.strip(), at)
        stop = self.linker.size(last.strip(), at) if colon else start + Size.of(1)
        is_inside = _is_at_least(start, 0) and _is_at_least(stop - start, 1) and _is_at_least(sizes[name] - stop, 0)
        if not is_inside:
            message = f"the range of the axis '{name}' must be inside [0, {sizes[name]}), got '{text}'"
            raise self._refuse(message, "write start:stop in terms of config sizes", "SAGE217", "take", name)
        return start, stop

    def _check_names(self, axes: list[str], right: Names) -> None:
        """Requires every axis once per side, except that single indices of `take` are omitted on the right."""
        after = [name for group in right for name in group]
        dropped = [name for name, text in self._taken.items() if ":" not in text]
        dropped += [name for name in axes if name.startswith(_ONE)]
        twice = [name for names in (axes, after) for name in names if names.count(name) > 1]
        unknown = [name for name in after if name not in axes or name in dropped]
        lost = [name for name in axes if name not in after and name not in dropped]
        unused = [name for name in self.source.sizes if name not in axes]
        findings = [
            (twice, "must appear once per side", "rename the second one, and add its size under `sizes`"),
            (unknown, "must also appear on the left", "each side names every axis once"),
            (lost, "must also appear on the right", "add it there, or read a single index of it with `take`"),
            (unused, "has a size but does not appear on the left", "remove the size, or use the axis"),
        ]
        for names, problem, help in findings:
            if names:
                raise self._refuse(f"the axis '{names[0]}' {problem}", help)

    def _refuse(self, message: str, help: str, code: str = "SAGE217", *path: str) -> Exception:
        return self.linker.refuse(message, (*self.path, *(path or ("rearrange",))), help, code)


def _is_at_least(size: Size, least: int) -> bool:
    """Whether a size is at least `least` for every config: it grows with the config sizes, which are at least 1."""
    grows = all(factor >= 0 for monomial, factor in size.terms if monomial)
    return grows and sum(factor for _, factor in size.terms) >= least


def _shape(dims: tuple[Size, ...]) -> str:
    return f"[{', '.join(map(str, dims))}]"
