"""Checks that the weights of a block which each take a part of one tensor take all of it, and nothing twice.

The chain of ranges is compared symbolically. What depends on conditions is checked when a checkpoint is loaded.
"""

from collections.abc import Iterable, Mapping

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.link.flatten import Placed
from sageLLM.codegen.model.layout import WeightDef
from sageLLM.codegen.model.source import PartDef
from sageLLM.codegen.schema.models import WeightSpec

Read = tuple[WeightDef, PartDef]


def check_covers(weights: Iterable[WeightDef], places: Mapping[str, Placed[WeightSpec]], sink: Sink) -> None:
    """Reports each tensor that is cut and not read exactly once."""
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
            help = f"it is read by: {names}; let the ranges of `take` follow each other to the end of the axis"
            sink.error("SAGE218", f"'{hf}' {problem}", places[first.name].span("hf"), help)


def _problem(reads: list[Read]) -> str | None:
    """What is wrong with the reads of one tensor, or None if its parts lie end to end along one axis."""
    parts = [part for _, part in reads]
    if any(part.axes != parts[0].axes for part in parts):
        return "is taken apart into different axes"
    cut = sorted({axis for part in parts for axis, _, _ in part.take})
    if len(cut) > 1:
        return "is cut along more than one axis"
    ranges = [(start, stop) for part in parts for _, start, stop in part.take]
    if len(ranges) < len(parts):
        return "is read whole and in part"
    return _gap(ranges, parts[0].axes[cut[0]])


def _gap(ranges: list[tuple[Size, Size]], size: Size) -> str | None:
    at, left = Size.of(0), list(ranges)
    while left:
        following = next((found for found in left if found[0] == at), None)
        if following is None:
            return f"is not read from {at} on, or read twice there"
        left.remove(following)
        at = following[1]
    return None if at == size else f"is read up to {at} of {size}"
