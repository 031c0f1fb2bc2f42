"""Makes the tensors that a step's graph reads from the chunks that the scheduler planned.

Rows are tokens: the chunks' tokens one after another, the decodes first. Names and types are those of
`specs/inputs.yaml`.
"""

from collections.abc import Sequence

import torch

from sageLLM.runtime.engine.kv_pool import slots_of
from sageLLM.runtime.scheduler.base import Chunk, Request


def step_inputs(
    chunks: Sequence[Chunk], rows: Sequence[int], block_size: int, device: torch.device
) -> dict[str, torch.Tensor | None]:
    """The step's inputs; `rows` are the token rows whose logits are wanted."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for chunk in chunks:
        ids += chunk_tokens(chunk)
        positions += range(chunk.start, chunk.start + chunk.num_tokens)
        slots += slots_of(chunk.request.kv_block_ids, chunk.start, chunk.num_tokens, block_size)
        starts.append(len(ids))
    lengths = [chunk.start + chunk.num_tokens for chunk in chunks]
    columns = {"ids": ids, "pos": positions, "slots": slots, "q_start": starts, "seq_lens": lengths, "rows": rows}
    inputs: dict[str, torch.Tensor | None] = {name: _int32(column, device) for name, column in columns.items()}
    inputs["block_table"] = _block_table([chunk.request for chunk in chunks], lengths, block_size, device)
    return inputs


def chunk_tokens(chunk: Chunk) -> list[int]:
    """The token ids of a chunk, out of the request's prompt followed by its outputs."""
    request, end = chunk.request, chunk.start + chunk.num_tokens
    split = request.num_prompt_tokens
    outputs = request.output_token_ids[max(0, chunk.start - split) : max(0, end - split)]
    return request.prompt_token_ids[chunk.start : min(end, split)] + outputs


def _block_table(
    requests: Sequence[Request], lengths: Sequence[int], block_size: int, device: torch.device
) -> torch.Tensor:
    """i32[B, MB]: each sequence's blocks, padded with block 0, which masking keeps from being read."""
    used = [-(-length // block_size) for length in lengths]
    width = max(used, default=1)
    table = [
        request.kv_block_ids[:count] + [0] * (width - count) for request, count in zip(requests, used, strict=True)
    ]
    return torch.tensor(table, dtype=torch.int32, device=device).reshape(len(table), width)


def _int32(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
