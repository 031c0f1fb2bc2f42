"""Sizes that decode steps are padded to on a GPU, so that all of them can be captured before the first request."""

from collections.abc import Iterator
from dataclasses import dataclass

MAX_ROWS = 256
"""Rows of the largest step that is captured: every bucket costs memory, and launches matter less in larger steps."""
MIN_WIDTH = 32
WIDTH_FACTOR = 4
"""Widths of the block table grow by this factor: programs for columns without keys end at once."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """Numbers of rows and widths of the block table, ascending. Without `rows` steps keep their number of rows.

    A padding row is a sequence of one token in `padding_block`, a block of the KV cache that no request has.
    """

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    padding_block: int

    def __post_init__(self) -> None:
        assert self.widths, "the last width must have room for the longest sequence"

    def num_rows(self, count: int) -> int:
        """The rows of a decode step of `count` sequences; larger steps than the last bucket are not padded."""
        return next((rows for rows in self.rows if rows >= count), count)

    def width(self, num_blocks: int) -> int:
        """The width of a table in which the longest sequence has `num_blocks` blocks."""
        return next(width for width in self.widths if width >= num_blocks)

    def descending(self) -> Iterator[tuple[int, int]]:
        """All pairs of rows and width, the largest first: the graphs of smaller ones fit in its memory."""
        return ((rows, width) for rows in reversed(self.rows) for width in reversed(self.widths))


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Powers of two, up to the first one of at least `max_rows`, or MAX_ROWS."""
    largest = min(max(max_rows, 1), MAX_ROWS)
    return tuple(1 << power for power in range((largest - 1).bit_length() + 1))


def table_widths(max_blocks: int) -> tuple[int, ...]:
    """MIN_WIDTH and its multiples by powers of WIDTH_FACTOR below `max_blocks`, then `max_blocks`."""
    widths, width = [], MIN_WIDTH
    while width < max_blocks:
        widths.append(width)
        width *= WIDTH_FACTOR
    return (*widths, max_blocks)
