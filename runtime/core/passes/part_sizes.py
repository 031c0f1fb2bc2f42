"""Sizes of the micro-batches of a step with symbolic sizes: T of the step becomes T0, T1... of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from sageLLM.runtime.core.ir.dims import Dim, Expr, Sym, evaluate
from sageLLM.runtime.core.ir.nodes import AttrValue, TensorRef

Sizes = Mapping[str, Dim]

DIVIDED = frozenset(("T", "Td", "Tp", "B", "KV", "KVd"))
"""The symbols that count rows, sequences and cached tokens of a step; each micro-batch has its own."""


@cache
def sizes_of_part(part: int) -> Sizes:
    """The sizes of a micro-batch."""
    return {name: Sym(f"{name}{part}") for name in DIVIDED}


@cache
def sizes_of_whole(parts: int) -> Sizes:
    """The sizes of a step as sums over its micro-batches.

    A sequence with rows in two micro-batches counts in both, so `B` is only meant where it counts rows, in a decode.
    """
    whole: dict[str, Dim] = dict.fromkeys(DIVIDED, 0)
    for part in range(parts):
        whole = {name: size + sizes_of_part(part)[name] for name, size in whole.items()}
    return whole


@cache
def sizes_before(part: int) -> Sizes:
    """The inverse of `sizes_of_part`: the sizes of a micro-batch as those of a step."""
    return {f"{name}{part}": Sym(name) for name in DIVIDED}


def with_sizes(ref: TensorRef, sizes: Sizes, suffix: str = "") -> TensorRef:
    """The value with these sizes, and the suffix appended to its name."""
    return replace(ref, name=ref.name + suffix, shape=tuple(evaluate(size, sizes) for size in ref.shape))


def attrs_with_sizes(attrs: Mapping[str, AttrValue], sizes: Sizes) -> dict[str, AttrValue]:
    return {name: evaluate(value, sizes) if isinstance(value, Expr) else value for name, value in attrs.items()}
