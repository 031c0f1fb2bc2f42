"""Checks that weights which share one checkpoint tensor read all of it, and no part twice.

The ranges are compared symbolically, so the check holds for every config. Tensors of conditional or tied weights are
checked when a checkpoint is loaded, because only then is it known which of the weights exist.
"""

from collections.abc import Iterable, Mapping

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.link.flat_layout import Located
from sageLLM.codegen.model.layout import WeightDef
from sageLLM.codegen.model.source import PartDef
from sageLLM.codegen.schema.models import WeightSpec

Read = tuple[WeightDef, PartDef]


def check_tensor_coverage(weights: Iterable[WeightDef], specs: Mapping[str, Located[WeightSpec]], sink: Sink) -> None:
    """Reports each tensor that is split among weights and not read exactly once."""
    reads: dict[str, list[Read]] = {}
    for weight in weights:
        for part in weight.parts:
            reads.setdefault(part.hf, []).append((weight, part))
    for hf, found in reads.items():
        is_cut = any(part.take for _, part in found)
        is_certain = all(weight.when is None and weight.tied_to is None for weight, _ in found)
        if is_cut and is_certain and (problem := _problem(found)):
            first = found[0][0]
            names = ", ".join(dict.fromkeys(weight.name for weight, _ in found))
            help = f"read by {names}; make the ranges of `take` cover the axis without gaps or overlaps"
            sink.error("SAGE218", f"'{hf}' {problem}", specs[first.name].span("hf"), help)


def _problem(reads: list[Read]) -> str | None:
    """The problem with the reads of one tensor, or None if they cover one axis without gaps or overlaps."""
    parts = [part for _, part in reads]
    if any(part.axes != parts[0].axes for part in parts):
        return "must be split into the same axes wherever it is read"
    cut = sorted({axis for part in parts for axis, _, _ in part.take})
    if len(cut) > 1:
        return "must be split along one axis only"
    ranges = [(start, stop) for part in parts for _, start, stop in part.take]
    if len(ranges) < len(parts):
        return "is read both whole and in part"
    return _gap(ranges, parts[0].axes[cut[0]])


def _gap(ranges: list[tuple[Size, Size]], size: Size) -> str | None:
    # The ranges are chained from 0 instead of sorted, because symbolic sizes have no order.
    at, left = Size.of(0), list(ranges)
    while left:
        following = next((found for found in left if found[0] == at), None)
        if following is None:
            return f"is not read exactly once at index {at}"
        left.remove(following)
        at = following[1]
    return None if at == size else f"is read only up to index {at} of {size}"
