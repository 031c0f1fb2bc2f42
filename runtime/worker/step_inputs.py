"""Builds the input tensors of a step's graph from the sequences of the step, in buffers that are reused.

Rows are tokens: the decodes first, then the tokens of each chunk. Names and types are those of `specs/inputs.yaml`.
While the same requests decode, positions and slots are computed as arrays and block tables are kept; only a request
that begins a block gets a new entry.
"""

from collections.abc import Sequence

import numpy as np
import torch

from sageLLM.runtime.loader.tables import Ints, PositionTables
from sageLLM.runtime.worker.sequences import SequenceChunk, WorkerSequence

Inputs = dict[str, torch.Tensor | None]
TOKEN_COLUMNS = ("ids", "pos", "slots", "rows")
SEQUENCE_COLUMNS = ("seq_lens", "q_start")
MAX_KEPT_VIEWS = 256


class StepInputs:
    """The inputs of one worker's steps. The tensors that `make` returns are valid until its next call.

    `max_blocks` is the length of the longest possible block table and the width of every row, so that the table's shape
    depends on the number of sequences only: plans and CUDA graphs are reused as contexts grow.

    `pos` are rows of `tables`, which differ from the positions of a sequence where its length changes the rotation.
    """

    def __init__(self, block_size: int, max_blocks: int, device: torch.device, tables: PositionTables) -> None:
        self._block_size, self._max_blocks, self._device = block_size, max_blocks, device
        self._tables = tables
        self._decodes: list[WorkerSequence] | None = None
        self._next_positions: Ints = np.zeros(0, np.int32)
        self._num_positions = 0  # the tokens of the longest decode
        self._first_rows: Ints | None = None
        self._views: dict[tuple[int, int, int], Inputs] = {}
        self._num_tokens = self._num_sequences = 0
        self._reserve(1, 1)

    def make(self, decodes: list[WorkerSequence], chunks: Sequence[SequenceChunk], rows: Sequence[int]) -> Inputs:
        """The inputs of a step with these decodes and chunks; `rows` are the token rows that need logits.

        If `decodes` is the list of the step before, each of its sequences must have one more token than then.
        """
        num_decodes = len(decodes)
        num_tokens = num_decodes + sum(chunk.num_tokens for chunk in chunks)
        num_sequences = num_decodes + len(chunks)
        self._reserve(max(num_tokens, len(rows)), num_sequences)
        if decodes:
            self._put_decodes(decodes)
        else:
            self._decodes = None  # the chunks overwrite the rows of the last decodes
        token = num_decodes
        if chunks:
            self._tables.begin_step()
        for sequence, chunk in enumerate(chunks, start=num_decodes):
            self._put_chunk(chunk, sequence, token)
            token += chunk.num_tokens
        self._rows[: len(rows)] = rows
        return self._inputs(num_tokens, num_sequences, len(rows))

    def _put_decodes(self, decodes: list[WorkerSequence]) -> None:
        n, size = len(decodes), self._block_size
        if decodes is not self._decodes:
            self._start_decodes(decodes)
        self._pos[:n] = positions = self._next_positions
        blocks, offsets = np.divmod(positions, size)
        for i in np.flatnonzero(offsets == 0).tolist():
            self._block_table[i, blocks[i]] = decodes[i].block_ids[blocks[i]]
        self._ids[:n] = [sequence.last_token_id for sequence in decodes]
        self._slots[:n] = self._block_table[self._counts[:n], blocks] * size + offsets
        positions += 1
        self._seq_lens[:n] = positions
        self._q_start[: n + 1] = self._counts[: n + 1]
        self._num_positions += 1
        if self._num_positions > self._tables.num_filled:
            self._tables.fill(self._num_positions)
        if self._first_rows is not None:
            self._pos[:n] += self._first_rows

    def _start_decodes(self, decodes: list[WorkerSequence]) -> None:
        """Takes positions and block tables of sequences that differ from those of the last decode step."""
        self._decodes = decodes
        positions = [sequence.num_tokens - 1 for sequence in decodes]
        self._next_positions = np.array(positions, np.int32)
        self._num_positions = max(positions)
        if self._tables.switch_len is not None:
            self._first_rows = np.array([self._tables.first_row(s.num_tokens) for s in decodes], np.int32)
        for i, sequence in enumerate(decodes):
            self._put_table(i, sequence)

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
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(TOKEN_COLUMNS, (self._num_tokens,))
        shapes |= dict.fromkeys(SEQUENCE_COLUMNS, (self._num_sequences + 1,))
        shapes["block_table"] = (self._num_sequences, self._max_blocks)
        # NumPy's zeros get memory on first use: most sequences are much shorter than a row of the block table.
        self._tensors = {name: torch.from_numpy(np.zeros(shape, np.int32)) for name, shape in shapes.items()}
        arrays: dict[str, Ints] = {name: tensor.numpy() for name, tensor in self._tensors.items()}
        self._ids, self._pos, self._slots, self._rows = (arrays[name] for name in TOKEN_COLUMNS)
        self._seq_lens, self._q_start = (arrays[name] for name in SEQUENCE_COLUMNS)
        self._block_table = arrays["block_table"]
        self._counts = np.arange(self._num_sequences + 1, dtype=np.int32)
        self._decodes = None
        self._views.clear()

    def _inputs(self, num_tokens: int, num_sequences: int, num_rows: int) -> Inputs:
        """Views of the buffers in the sizes of the step; for another device, copies of them.

        Views are kept, because slicing every tensor in each step costs several microseconds.
        """
        key = num_tokens, num_sequences, num_rows
        inputs = self._views.get(key)
        if inputs is None:
            lengths = dict.fromkeys(TOKEN_COLUMNS, num_tokens) | {"rows": num_rows, "q_start": num_sequences + 1}
            lengths |= {"seq_lens": num_sequences, "block_table": num_sequences}
            inputs = {name: tensor[: lengths[name]] for name, tensor in self._tensors.items()}
            if len(self._views) >= MAX_KEPT_VIEWS:
                self._views.clear()
            self._views[key] = inputs
        if self._device.type == "cpu":
            return dict(inputs)
        return {name: None if x is None else x.to(self._device) for name, x in inputs.items()}
