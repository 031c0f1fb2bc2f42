"""Comparison of a checkpoint's tensors with those that a layout reads: names, shapes, each element exactly once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from math import prod
from typing import Any, Protocol

from sageLLM.runtime.core.model.weights import Part, View, WeightSpec
from sageLLM.runtime.core.printable import quoted

MAX_PROBLEMS = 1000
MAX_IGNORED = 1024
"""A bound on the numbers in a pattern of ignored tensors, since a config may claim any number of layers."""
Shape = tuple[int, ...]


class ReadsWeights(Protocol):
    """The part of a layout that the comparison uses."""

    @property
    def ignore(self) -> tuple[str, ...]: ...

    def weights(self, config: Any, /) -> Iterable[WeightSpec]: ...


def check_checkpoint(layout: ReadsWeights, config: Any, shapes: Mapping[str, Shape | None]) -> list[str]:
    """The differences between a checkpoint's tensors (name -> shape) and those that the layout reads, a sentence each.

    A tensor may be missing if its weight is tied, and unread if the layout ignores its name. A shape of None is
    unknown, as in an index file. The list ends after MAX_PROBLEMS, since a config may claim any number of layers.
    """
    reads = _Reads(shapes)
    for weight in layout.weights(config):
        if len(reads.problems) >= MAX_PROBLEMS:  # checked in the loop: `weights` may be a generator without end
            return reads.problems[:MAX_PROBLEMS]
        reads.add(weight)
    problems = [*reads.problems, *reads.wrong_covers()]
    patterns = ignore_patterns(layout, config)
    for name, shape in shapes.items():
        if name not in reads.names and not is_ignored(name, patterns):
            problems.append(f"tensor {quoted(name)}{_dims(shape)} is unused by the layout")
            if len(problems) >= MAX_PROBLEMS:
                break
    return problems[:MAX_PROBLEMS]


def ignore_patterns(layout: ReadsWeights, config: Any) -> tuple[str, ...]:
    """The patterns of tensors that the layout knows and does not read; `{L}` is replaced by the config's L.

    `{L..N}` is replaced by each number from L to N - 1, at most MAX_IGNORED of them.
    """
    expanded = [one for text in layout.ignore for one in _expanded(text, config)]
    return tuple(re.sub(r"\{(\w+)\}", lambda found: str(getattr(config, found[1])), text) for text in expanded)


def _expanded(pattern: str, config: Any) -> Iterator[str]:
    found = re.search(r"\{(\w+)\.\.(\w+)\}", pattern)
    if found is None:
        yield pattern
        return
    first, end = getattr(config, found[1]), getattr(config, found[2])
    for number in range(first, min(end, first + MAX_IGNORED)):
        yield from _expanded(pattern.replace(found[0], str(number)), config)


def is_ignored(name: str, patterns: Iterable[str]) -> bool:
    return any(_matches(name, pattern) for pattern in patterns)


@dataclass(slots=True)
class _Reads:
    """The weights that read each tensor; only reads that may conflict are kept, since checkpoints have many tensors."""

    shapes: Mapping[str, Shape | None]
    problems: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    whole: dict[str, str] = field(default_factory=dict)
    partial: dict[str, list[tuple[str, Part]]] = field(default_factory=dict)

    def add(self, weight: WeightSpec) -> None:
        for part in weight.parts:
            self._compare(weight, part)
            self.names.add(part.name)
            if weight.tied_to is None:
                self._note(weight, part)

    def _compare(self, weight: WeightSpec, part: Part) -> None:
        if part.name not in self.shapes:
            if weight.tied_to is None and part.name not in self.names:
                text = f"missing tensor '{part.name}'{_dims(part.shape)}, which fills {weight.name}"
                self.problems.append(text)
            return
        got = self.shapes[part.name]
        if got is not None and tuple(got) != part.shape:
            self.problems.append(
                f"tensor '{part.name}': expected{_dims(part.shape)} for {weight.name}, got{_dims(tuple(got))}"
            )
        elif part.view is not None and prod(part.view.axes) != prod(part.shape):
            axes = f"cannot be reshaped to{_dims(part.view.axes)} for {weight.name}"
            self.problems.append(f"tensor '{part.name}'{_dims(part.shape)} {axes}")

    def _note(self, weight: WeightSpec, part: Part) -> None:
        if part.view is not None and part.view.take:
            self.partial.setdefault(part.name, []).append((weight.name, part))
        elif part.name in self.whole:
            self.problems.append(_twice(part.name, self.whole[part.name], weight.name))
        else:
            self.whole[part.name] = weight.name

    def wrong_covers(self) -> Iterator[str]:
        """Problems of tensors with elements that are read twice or not at all."""
        for name, reads in self.partial.items():
            if name in self.whole:
                yield _twice(name, self.whole[name], reads[0][0])
            else:
                yield from _wrong_cover(name, reads)


def _wrong_cover(name: str, reads: list[tuple[str, Part]]) -> Iterator[str]:
    # Disjoint parts that sum to the size of the tensor cover it, so no element needs to be marked.
    views = [(weight, part.view) for weight, part in reads if part.view is not None]
    for (first, a), (second, b) in combinations(views, 2):
        if a.axes != b.axes:
            yield f"tensor '{name}' is reshaped to{_dims(a.axes)} for {first}, but to{_dims(b.axes)} for {second}"
            return
        if _overlap(a, b):
            yield _twice(name, first, second)
            return
    count = sum(prod(stop - start for start, stop in view.ranges) for _, view in views)
    missing = prod(views[0][1].axes) - count
    if missing:
        yield f"tensor '{name}': {missing} elements are unused by the layout"


def _overlap(a: View, b: View) -> bool:
    return all(max(x[0], y[0]) < min(x[1], y[1]) for x, y in zip(a.ranges, b.ranges, strict=True))


def _twice(name: str, first: str, second: str) -> str:
    if first == second:
        return f"tensor '{name}' is read twice by {first}"
    return f"tensor '{name}' is read by both {first} and {second}; tie one to the other"


def _dims(shape: Shape | None) -> str:
    return "" if shape is None else f" [{', '.join(map(str, shape))}]"


def _matches(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern with an optional leading and trailing `*`."""
    core = pattern.strip("*")
    if pattern.startswith("*") and pattern.endswith("*"):
        return core in name
    if pattern.startswith("*"):
        return name.endswith(core)
    return name.startswith(core) if pattern.endswith("*") else name == pattern
