"""Builds the input tensors of a step's graph from the sequences of the step, in buffers that are reused.

Rows are tokens: the decodes first, then the tokens of each chunk. Names and types are those of `specs/inputs.yaml`.
While the same requests decode, their rows are updated in place: one is added to positions, slots and lengths, and a
request that begins a block gets a new entry in the block table.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sageLLM.runtime.executor.buckets import Buckets
from sageLLM.runtime.loader.tables import Ints, PositionTables
from sageLLM.runtime.worker.recent import Recent
from sageLLM.runtime.worker.sequences import DecodeBatch, SequenceChunk, WorkerSequence

Inputs = dict[str, torch.Tensor | None]
ADVANCING = ("pos", "slots", "seq_lens")
"""Columns that grow by one from a decode step to the next, apart from slots at the beginning of a block."""
COLUMNS = (*ADVANCING, "ids", "rows", "q_start")
MAX_KEPT_VIEWS = 256


class Draws(NamedTuple):
    """The temperatures of the first rows with logits, 0 for greedy ones, and a uniform number in [0, 1) for each."""

    temperatures: npt.NDArray[np.float64]
    uniforms: npt.NDArray[np.float64]


class DecodeRows(NamedTuple):
    """The rows of decodes in their last step, and what `_start_decodes` derives from their sequences."""

    columns: Ints
    block_table: Ints
    positions: list[int]
    num_steps: int
    crossings: list[list[int]]
    num_positions: int


class StepInputs:
    """The inputs of one worker's steps. The tensors that `make` returns are valid until its next call.

    `max_blocks` is the length of the longest possible block table and the width of every row, so that the table's shape
    depends on the number of sequences only: native plans are reused as contexts grow. With `buckets`, for a GPU, tables
    have the smallest of a few widths, and steps of decodes alone are padded to one of a few numbers of rows; the inputs
    then have the numbers of `Draws`, as bits in i32.

    `num_batches` batches of decodes can take turns: the rows of the others are kept, and restored in their next step.

    `pos` are rows of `tables`, which differ from the positions of a sequence where its length changes the rotation.
    """

    def __init__(
        self,
        block_size: int,
        max_blocks: int,
        tables: PositionTables,
        buckets: Buckets | None = None,
        num_batches: int = 1,
    ) -> None:
        self._block_size, self._max_blocks = block_size, max_blocks
        self._tables, self._buckets = tables, buckets
        # The decodes of the last step: their first positions by row, the steps since then, and the rows that begin a
        # block in step i, i + block_size, ...
        self._decodes: DecodeBatch | None = None
        self._positions: list[int] = []
        self._num_steps = 0
        self._crossings: list[list[int]] = []
        self._num_positions = 0  # the tokens of the longest decode
        self._num_padded = 0  # the rows of a step of decodes with those of padding, 0 if they are not filled
        self._num_batches = num_batches
        self._kept: Recent[DecodeBatch, DecodeRows] = Recent(num_batches)
        self._last_rows: Sequence[int] | None = None
        self._steady: Inputs | None = None  # the inputs of the last step, if it was one of decodes alone on a CPU
        self._views: dict[tuple[int, int, int, int], Inputs] = {}
        self._num_tokens = self._num_sequences = self._num_drawn = 0
        self._reserve(1, 1)

    def make(
        self,
        decodes: DecodeBatch,
        chunks: Sequence[SequenceChunk],
        rows: Sequence[int],
        draws: Draws | None = None,
    ) -> Inputs:
        """The inputs of a step with these decodes and chunks; `rows` are the token rows that need logits.

        If `decodes` is the object of the step before, each of its sequences must have one more token than then; if
        `rows` is, it must not have changed. With several batches the first holds for each of the last ones. The caller
        must not change the result, which is kept for steps of its size.
        """
        if self._steady is not None and decodes is self._decodes and rows is self._last_rows and not chunks:
            self._advance_decodes(decodes)
            return self._steady
        num_decodes = len(decodes)
        num_tokens = num_decodes + sum(chunk.num_tokens for chunk in chunks)
        num_sequences = num_decodes + len(chunks)
        if self._buckets is None:
            self._reserve(max(num_tokens, len(rows)), num_sequences)
        else:
            padded = self._buckets.num_rows(num_decodes)
            self._reserve(max(num_tokens, len(rows), padded), max(num_sequences, padded))
            self._put_draws(draws)
        if decodes is not self._decodes:
            self._keep_decodes()
        if not num_decodes:
            self._decodes = None  # the chunks overwrite the rows of the last decodes
        elif decodes is self._decodes:
            self._advance_decodes(decodes)
        elif (kept := self._kept.take(decodes)) is not None:
            self._restore_decodes(decodes, kept)
            self._advance_decodes(decodes)
        else:
            self._start_decodes(decodes)
        token = num_decodes
        if chunks:
            self._tables.begin_step()
        for sequence, chunk in enumerate(chunks, start=num_decodes):
            self._put_chunk(chunk, sequence, token)
            token += chunk.num_tokens
        if rows is not self._last_rows:
            self._rows[: len(rows)] = rows
            self._last_rows = rows
            self._num_padded = 0
        if self._buckets is None:
            inputs = self._inputs(num_tokens, num_sequences, len(rows), self._max_blocks)
            self._steady = None if chunks else inputs
            return inputs
        width = self._buckets.width(-(-self._longest(num_decodes, chunks) // self._block_size))
        if chunks or len(rows) != num_decodes:
            self._num_padded = 0
            return self._inputs(num_tokens, num_sequences, len(rows), width)
        padded = self._pad(num_decodes, self._buckets)
        return self._inputs(padded, padded, padded, width)

    def _put_draws(self, draws: Draws | None) -> None:
        self._temperature[: self._num_drawn] = 0.0
        self._num_drawn = 0 if draws is None else len(draws.temperatures)
        if draws is not None:
            self._temperature[: self._num_drawn] = draws.temperatures
            self._uniform[: self._num_drawn] = draws.uniforms

    def _longest(self, num_decodes: int, chunks: Sequence[SequenceChunk]) -> int:
        """The tokens of the longest sequence of the step."""
        longest = self._num_positions if num_decodes else 1
        return max([longest, *(chunk.start + chunk.num_tokens for chunk in chunks)])

    def _pad(self, num_decodes: int, buckets: Buckets) -> int:
        """Fills the rows after the decodes with padding; returns the number of all rows."""
        end = buckets.num_rows(num_decodes)
        if end == num_decodes or end == self._num_padded:
            return end
        padding = slice(num_decodes, end)
        self._ids[padding] = self._pos[padding] = 0
        self._seq_lens[padding] = 1
        self._slots[padding] = buckets.padding_block * self._block_size
        self._block_table[padding, 0] = buckets.padding_block
        self._q_start[: end + 1] = self._counts[: end + 1]
        self._rows[padding] = self._counts[padding]
        self._num_padded = end
        return end

    def forget(self) -> None:
        """Fills all rows again in the next step, after one that has not run."""
        self._decodes = None
        self._kept.clear()

    def _keep_decodes(self) -> None:
        """Copies the rows of the last decodes, if they may have another turn."""
        if self._num_batches == 1 or not self._decodes:
            return
        n, num_blocks = len(self._decodes), self._num_positions // self._block_size + 1
        rows = DecodeRows(
            self._columns[:, :n].copy(),
            self._block_table[:n, :num_blocks].copy(),
            self._positions,
            self._num_steps,
            self._crossings,
            self._num_positions,
        )
        self._kept.put(self._decodes, rows)

    def _restore_decodes(self, decodes: DecodeBatch, kept: DecodeRows) -> None:
        """Writes the rows as they were in the last step of these decodes."""
        n, num_blocks = kept.block_table.shape
        self._decodes, self._num_padded = decodes, 0
        self._decode_ids, self._advancing = self._ids[:n], self._columns[:, :n]
        self._advancing[:] = kept.columns
        self._block_table[:n, :num_blocks] = kept.block_table
        self._q_start[: n + 1] = self._counts[: n + 1]
        self._positions, self._num_steps = kept.positions, kept.num_steps
        self._crossings, self._num_positions = kept.crossings, kept.num_positions

    def _start_decodes(self, decodes: DecodeBatch) -> None:
        """Fills the rows of sequences that differ from those of the last decode step."""
        n, size = len(decodes), self._block_size
        self._decodes = decodes
        self._positions = [sequence.num_tokens - 1 for sequence in decodes]
        self._num_steps = self._num_padded = 0
        self._num_positions = max(self._positions) + 1
        self._tables.fill(self._num_positions)
        self._crossings = [[] for _ in range(size)]
        for row, (sequence, position) in enumerate(zip(decodes, self._positions, strict=True)):
            self._crossings[-position % size].append(row)
            self._put_table(row, sequence)
        positions = np.array(self._positions, np.int32)
        blocks, offsets = np.divmod(positions, size)
        self._decode_ids = self._ids[:n]
        self._decode_ids[:] = decodes.last_token_ids()
        self._pos[:n] = positions
        if self._tables.switch_len is not None:
            self._pos[:n] += np.array([self._tables.first_row(s.num_tokens) for s in decodes], np.int32)
        self._slots[:n] = self._block_table[self._counts[:n], blocks] * size + offsets
        self._seq_lens[:n] = positions + 1
        self._q_start[: n + 1] = self._counts[: n + 1]
        self._advancing = self._columns[:, :n]

    def _advance_decodes(self, decodes: DecodeBatch) -> None:
        """Moves the rows of the last decode step on by one token."""
        size = self._block_size
        self._decode_ids[:] = decodes.last_token_ids()
        self._advancing += 1
        self._num_steps += 1
        for row in self._crossings[self._num_steps % size]:
            index = (self._positions[row] + self._num_steps) // size
            self._block_table[row, index] = block = decodes.block_id(row, index)
            self._slots[row] = block * size
        self._num_positions += 1
        if self._num_positions > self._tables.num_filled:
            self._tables.fill(self._num_positions)

    def _put_chunk(self, chunk: SequenceChunk, sequence: int, token: int) -> None:
        end, size = token + chunk.num_tokens, self._block_size
        last = chunk.start + chunk.num_tokens
        self._ids[token:end] = chunk.sequence.tokens(chunk.start, last)
        positions = np.arange(chunk.start, last, dtype=np.int32)
        tokens = chunk.sequence
        self._pos[token:end] = self._tables.rows(positions, tokens.num_tokens, len(tokens.prompt_token_ids))
        self._seq_lens[sequence] = last
        self._q_start[sequence : sequence + 2] = token, end
        self._put_table(sequence, chunk.sequence)
        blocks, offsets = np.divmod(positions, size)
        self._slots[token:end] = self._block_table[sequence, blocks] * size + offsets

    def _put_table(self, row: int, sequence: WorkerSequence) -> None:
        """Writes a row of the block table.

        The rest of the row keeps block numbers of earlier sequences. Kernels never read them: they stop at seq_lens.
        """
        blocks = sequence.block_ids
        self._block_table[row, : len(blocks)] = blocks

    def _reserve(self, num_tokens: int, num_sequences: int) -> None:
        """Grows the buffers to at least these sizes; those per sequence have one more row, for q_start."""
        if num_tokens <= self._num_tokens and num_sequences <= self._num_sequences:
            return
        # Doubling keeps the number of reallocations, each of which changes the addresses in every plan, logarithmic.
        self._num_tokens = max(num_tokens, 2 * self._num_tokens)
        self._num_sequences = max(num_sequences, 2 * self._num_sequences)
        length = max(self._num_tokens, self._num_sequences + 1)
        # NumPy's zeros get memory on first use: most sequences are much shorter than a row of the block table.
        table = np.zeros((self._num_sequences, self._max_blocks), np.int32)
        columns = np.zeros((len(COLUMNS), length), np.int32)
        self._columns = columns[: len(ADVANCING)]
        arrays: dict[str, Ints] = {**dict(zip(COLUMNS, columns, strict=True)), "block_table": table}
        if self._buckets is not None:
            self._temperature, self._uniform = np.zeros(length, np.float32), np.zeros(length)
            arrays |= {
                "draw_temperature": self._temperature.view(np.int32),
                "draw_uniform": self._uniform.view(np.int32),
            }
            self._num_drawn = 0
        self._tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self._pos, self._slots, self._seq_lens, self._ids, self._rows, self._q_start = columns
        self._block_table = table
        self._counts = np.arange(length, dtype=np.int32)
        self._decodes = self._last_rows = None
        self._num_padded = 0
        self._views.clear()

    def _inputs(self, num_tokens: int, num_sequences: int, num_rows: int, width: int) -> Inputs:
        """Views of the buffers in the sizes of the step.

        Views are kept, because slicing every tensor in each step costs several microseconds.
        """
        key = num_tokens, num_sequences, num_rows, width
        inputs = self._views.get(key)
        if inputs is None:
            lengths = dict.fromkeys(("ids", "pos", "slots"), num_tokens) | {"rows": num_rows}
            lengths |= {"seq_lens": num_sequences, "block_table": num_sequences, "q_start": num_sequences + 1}
            lengths |= {"draw_temperature": num_rows, "draw_uniform": 2 * num_rows}
            inputs = {name: tensor[: lengths[name]] for name, tensor in self._tensors.items()}
            inputs["block_table"] = self._tensors["block_table"][:num_sequences, :width]
            if len(self._views) >= MAX_KEPT_VIEWS:
                self._views.clear()
            self._views[key] = inputs
        return inputs
