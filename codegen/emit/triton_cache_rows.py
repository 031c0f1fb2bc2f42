"""Stores of rows of KV caches in Triton: as elements, or as codes with a scale, which depends on the whole row.

if k_out.dtype.element_ty == E:
    tl.store(k_out + slot * k_out_BS + i, y, mask=...)
else:
    device.store_encoded(k_out + slot * k_out_BS, i, y, mask, is_row)

A row of several pieces has one scale, so that their largest magnitude comes first.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sageLLM.codegen.emit.triton_names import affine
from sageLLM.codegen.kernel.names import OwnNames
from sageLLM.codegen.kernel.rows import Location
from sageLLM.codegen.model.op import Operand


class Piece(NamedTuple):
    """A part of a row of a cache: its place, the name of its values, and the mask of those that exist."""

    location: Location
    value: str
    mask: str


def store_lines(cache: Operand, rows: str, pieces: Sequence[tuple[str, Piece]], own: OwnNames) -> list[str]:
    """The lines that store complete rows; `rows` are their addresses, and each piece has that of its elements."""
    name, is_row = cache.name, own("is_row")
    lines = [f"if {name}.dtype.element_ty == {cache.type.element}:"]
    lines += [f"    tl.store({address}, {one.value}, mask={one.mask})" for address, one in pieces]
    lines.append("else:")
    if len(pieces) == 1:
        [(_, one)] = pieces
        column = affine(one.location.index[-1])
        return [*lines, f"    device.store_encoded({rows}, {column}, {one.value}, {one.mask}, {is_row})"]
    row, largest, scale = own(f"{name}_rows"), own(f"{name}_largest"), own(f"{name}_scale")
    lines.append(f"    {row} = {rows}")
    magnitudes = [f"device.largest_magnitude({one.value}, {one.mask})" for _, one in pieces]
    lines.append(f"    {largest} = {magnitudes[0]}")
    lines += [
        f"    {largest} = tl.maximum({largest}, {text}, propagate_nan=tl.PropagateNan.ALL)" for text in magnitudes[1:]
    ]
    lines.append(f"    {scale} = device.scale_of_codes({row}, {largest})")
    lines.append(f"    device.store_scales({row}, {scale}, {is_row})")
    for _, one in pieces:
        lines.append(
            f"    device.store_codes({row}, {affine(one.location.index[-1])}, {one.value}, {scale}, {one.mask})"
        )
    return lines
