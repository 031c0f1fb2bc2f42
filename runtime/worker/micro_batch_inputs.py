"""Inputs of the micro-batches of a step: equal ranges of its token rows, each with attention metadata.

A part has every sequence with rows in its range. A chunk can be in several parts, each of which is a chunk of the same
sequence: its length ends with the part, and its later rows attend to the keys that the parts before have stored.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sageLLM.runtime.worker.sequences import SequenceChunk
from sageLLM.runtime.worker.step_inputs import MAX_KEPT_VIEWS, Inputs

ROWS = ("pos", "slots")
"""The inputs with an entry per token row that layers read."""


class MicroBatchInputs:
    """Divides the inputs of steps; those of a part have the suffix `.p0`, `.p1`..."""

    def __init__(self, num_parts: int) -> None:
        self.num_parts = num_parts
        self._views: dict[tuple[int, int], Inputs] = {}

    def divide(self, inputs: Inputs, num_decodes: int, chunks: Sequence[SequenceChunk]) -> Inputs:
        """The inputs of a step together with those of its parts. There must be a row for each part."""
        if not chunks:
            return inputs | self._decode_parts(inputs, num_decodes)
        lengths = [chunk.num_tokens for chunk in chunks]
        starts = np.cumsum([0, *(1 for _ in range(num_decodes)), *lengths])
        parts: Inputs = {}
        for part, (first, end) in enumerate(ranges(int(starts[-1]), self.num_parts)):
            # The sequences with a row in the range.
            low = int(np.searchsorted(starts, first, "right")) - 1
            high = int(np.searchsorted(starts, end, "left"))
            q_start = torch.from_numpy((starts[low : high + 1].clip(first, end) - first).astype(np.int32))
            seq_lens = _present(inputs["seq_lens"])[low:high]
            if rest := int(starts[high]) - end:
                seq_lens = seq_lens.clone()
                seq_lens[-1] -= rest
            own = {name: _present(inputs[name])[first:end] for name in ROWS}
            own |= {"seq_lens": seq_lens, "block_table": _present(inputs["block_table"])[low:high]}
            own["q_start"] = q_start
            parts |= {f"{name}.p{part}": x for name, x in own.items()}
        return inputs | parts

    def _decode_parts(self, inputs: Inputs, num_decodes: int) -> Inputs:
        """Views, which are kept: the plan runs without preparation if all addresses are those of the last step."""
        pos = _present(inputs["pos"])
        key = pos.data_ptr(), num_decodes
        parts = self._views.get(key)
        if parts is None:
            parts = {}
            for part, (first, end) in enumerate(ranges(num_decodes, self.num_parts)):
                for name in (*ROWS, "seq_lens", "block_table"):
                    parts[f"{name}.p{part}"] = _present(inputs[name])[first:end]
                parts[f"q_start.p{part}"] = torch.arange(end - first + 1, dtype=torch.int32)
            if len(self._views) >= MAX_KEPT_VIEWS:
                self._views.clear()
            self._views[key] = parts
        return parts


def ranges(num_rows: int, num_parts: int) -> list[tuple[int, int]]:
    """The rows of each micro-batch of a step: the first one, and the end."""
    return list(pairwise(num_rows * part // num_parts for part in range(num_parts + 1)))


def _present(x: Tensor | None) -> Tensor:
    assert x is not None, "a step has all inputs of its layers"
    return x
