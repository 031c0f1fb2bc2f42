"""Constant tables of a layout: cos and sin of rotary embeddings by position, and ALiBi slopes.

Rows of the rope tables are computed when the first sequence reaches their positions. They are numbered so that
sequences with different frequencies share the tables:

    no scaling by length    position
    longrope                position, or trained length + position for a sequence beyond the trained length
    dynamic                 position; the prompt of a longer sequence gets rows for one step, after all others
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sageLLM.runtime.core.model.rope import RopeSpec
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.rope import RopeRows, rope_rows

ROWS_AT_ONCE = 2048
"""Rows are computed in chunks of this many positions, so that a growing sequence seldom waits for one.

The chunks are the same in every run: the last bit of a row may depend on the vectors that it is computed in.
"""
MIN_STEP_ROWS = 2**16
"""Rows for the prompts of one step with dynamic scaling; a prompt of the full length has room in any case."""
MAX_TABLE_BYTES = 768 * 2**20
"""A bound on the tables of a device that allocates all rows at once. On a CPU, memory is allocated row by row."""
Ints = npt.NDArray[np.int32]


class _Region(NamedTuple):
    """Rows `first ..` for the positions `start .. stop - 1` of sequences of `length` tokens.

    None: the sequence ends with the position.
    """

    first: int
    start: int
    stop: int
    length: int | None


class PositionTables:
    """The tables by their names in graphs, for sequences of up to `max_len` tokens.

    `tensors` have all rows from the start, at fixed addresses, because plans are bound to them; `fill` computes the
    rows of the first `num_filled` positions.

    Sequences of more than `switch_len` tokens (None: no such length) have other frequencies at every position, so that
    none of the KV of shorter ones is valid for them. `dynamic_len` is the trained length of dynamic scaling: a prompt
    of more tokens has the frequencies of its length, and a later token those of the sequence that ends with it.
    """

    def __init__(self, config: Any, max_len: int, device: torch.device | str = "cpu") -> None:
        """Raises CheckpointError for frequencies that are not finite, and for tables that do not fit in memory."""
        device = torch.device(device)
        self._ropes: Mapping[str, RopeSpec] = config.rope
        self._max_len = max_len
        self.switch_len = self._length_of("longrope", "longrope_mscale", "su")
        self.dynamic_len = self._length_of("dynamic")
        if self.switch_len is not None and self.dynamic_len is not None:
            raise CheckpointError("longrope and dynamic scaling must not be combined in one model")
        self._regions = self._make_regions()
        last = self._regions[-1]
        self._first_step_row = last.first + last.stop - last.start
        self._num_step_rows = 0 if self.dynamic_len is None else max(max_len, MIN_STEP_ROWS)
        self._num_used_step_rows = 0
        self._tables = {name: self._allocate(rope, device) for name, rope in self._ropes.items()}
        self.tensors = {
            f"{part}{_suffix(name)}": x for name, t in self._tables.items() for part, x in t._asdict().items()
        }
        if config.alibi is not None:
            # Slopes depend on the number of heads of the whole model; a rank has a contiguous part of the heads.
            slopes = alibi_slopes(config.alibi.heads, config.alibi.max_bias)
            self.tensors["slopes"] = slopes.chunk(config.tp)[config.rank].to(device)
        self.num_filled = 0
        self.fill(1)
        for rope in self._ropes.values():  # the largest length now, so that no step fails
            rope_rows(rope, torch.tensor([max_len - 1]), max_len)

    def _length_of(self, *kinds: str) -> int | None:
        """The trained length of these kinds of scaling, if sequences can be longer and then have other frequencies."""
        found = {
            rope.trained
            for rope in self._ropes.values()
            if rope.kind in kinds and rope.trained < self._max_len and _depends_on_length(rope)
        }
        if len(found) > 1:
            raise CheckpointError(f"rope sections of one model must have one trained length, got {sorted(found)}")
        return found.pop() if found else None

    def _make_regions(self) -> list[_Region]:
        n = self._max_len
        if (short := self.switch_len) is not None:
            return [_Region(0, 0, short, short), _Region(short, 0, n, n)]
        if (short := self.dynamic_len) is not None:
            return [_Region(0, 0, short, short), _Region(short, short, n, None)]
        return [_Region(0, 0, n, n)]

    def _allocate(self, rope: RopeSpec, device: torch.device) -> RopeRows:
        num_rows = self._first_step_row + self._num_step_rows
        num_bytes = 4 * num_rows * rope.dim  # cos and sin, half of the dims each
        if device.type != "cpu" and num_bytes > MAX_TABLE_BYTES:
            raise CheckpointError(
                f"the rope tables of {self._max_len} positions must have at most {MAX_TABLE_BYTES >> 20} MiB, "
                f"got {num_bytes >> 20}; pass a lower max_model_len"
            )
        try:
            cos, sin = (torch.empty(num_rows, rope.dim // 2, device=device) for _ in range(2))
        except RuntimeError:
            raise CheckpointError(
                f"the rope tables of {self._max_len} positions must fit in memory, got {num_bytes >> 20} MiB; "
                "pass a lower max_model_len"
            ) from None
        return RopeRows(cos, sin)

    def fill(self, num_positions: int) -> None:
        """Computes the rows of the first `num_positions` positions that are missing."""
        while self.num_filled < num_positions:
            assert num_positions <= self._max_len, "a position must be below the longest sequence"
            begin, end = self.num_filled, min(self._max_len, self.num_filled + ROWS_AT_ONCE)
            for region in self._regions:
                start, stop = max(begin, region.start), min(end, region.stop)
                if start < stop:
                    positions = torch.arange(start, stop)
                    length = positions + 1 if region.length is None else region.length
                    self._write(region.first + start - region.start, positions, length)
            self.num_filled = end

    def begin_step(self) -> None:
        """Makes the rows of the last step's prompts available again."""
        self._num_used_step_rows = 0

    def first_row(self, num_tokens: int) -> int:
        """The row of position 0 for a sequence of this length, except for a prompt beyond `dynamic_len`."""
        return self.switch_len if self.switch_len is not None and num_tokens > self.switch_len else 0

    def rows(self, positions: Ints, num_tokens: int, num_prompt_tokens: int) -> Ints:
        """The rows of consecutive positions of a sequence of this length. Valid until the next step begins."""
        self.fill(int(positions[-1]) + 1)
        if self.dynamic_len is not None and num_prompt_tokens > self.dynamic_len:
            return self._prompt_rows(positions, num_prompt_tokens)
        first = self.first_row(num_tokens)
        return positions + np.int32(first) if first else positions

    def salt(self, num_prompt_tokens: int) -> str:
        """A name that differs for prompts that must not share KV, apart from the difference that `switch_len` makes."""
        if self.dynamic_len is None or num_prompt_tokens <= self.dynamic_len:
            return ""
        return f"dynamic {num_prompt_tokens}"

    def _prompt_rows(self, positions: Ints, num_prompt_tokens: int) -> Ints:
        """Computes rows with the frequencies of the prompt's length; tokens after the prompt have the ordinary rows."""
        count = int(np.searchsorted(positions, num_prompt_tokens))
        first, end = self._num_used_step_rows, self._num_used_step_rows + count
        if end > self._num_step_rows:
            raise ValueError(
                f"a step must have at most {self._num_step_rows} prompt tokens beyond the trained length of "
                f"{self.dynamic_len}, got {end}; lower max_prefill_tokens"
            )
        self._num_used_step_rows = end
        first += self._first_step_row
        self._write(first, torch.from_numpy(positions[:count]), num_prompt_tokens)
        return np.concatenate((np.arange(first, first + count, dtype=np.int32), positions[count:]))

    def _write(self, first: int, positions: Tensor, length: int | Tensor) -> None:
        for name, rope in self._ropes.items():
            made, table = rope_rows(rope, positions, length), self._tables[name]
            table.cos[first : first + len(positions)] = made.cos
            table.sin[first : first + len(positions)] = made.sin


def _depends_on_length(rope: RopeSpec) -> bool:
    """Whether sequences beyond the trained length have other frequencies."""
    scaling = rope.scaling or {}
    return rope.kind == "dynamic" or scaling["short_factor"] != scaling["long_factor"]


def _suffix(name: str) -> str:
    return f"_{name}" if name else ""


def alibi_slopes(num_heads: int, max_bias: float) -> Tensor:
    """ALiBi slopes f32[num_heads]: 2 ** (-max_bias * k / n) for k = 1 .. n, for n = 2^m heads (arXiv 2108.12409).

    For other numbers of heads, n is the next lower power of two: the first n heads have these slopes, and the others
    have every second slope of 2n heads.
    """
    n = 2 ** math.floor(math.log2(num_heads))
    first = [2.0 ** (-max_bias * k / n) for k in range(1, n + 1)]
    between = [2.0 ** (-max_bias * k / (2 * n)) for k in range(1, 2 * (num_heads - n), 2)]
    return torch.tensor(first + between, dtype=torch.float32)
