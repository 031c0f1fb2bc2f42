"""Reused step inputs equal freshly computed ones while requests join, leave and are preempted."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.worker.sequences import MAX_KEPT_STEPS, DecodeBatch, SequenceChunk, WorkerSequence
from sageLLM.runtime.worker.step_inputs import Draws, Inputs, StepInputs

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"
BLOCK_SIZE = 4


def plain_inputs(chunks: Sequence[SequenceChunk]) -> dict[str, list[int]]:
    """The columns of a step, token by token."""
    made: dict[str, list[int]] = {name: [] for name in ("ids", "pos", "slots", "seq_lens")}
    made["q_start"] = [0]
    for chunk in chunks:
        positions = range(chunk.start, chunk.start + chunk.num_tokens)
        tokens = [*chunk.sequence.prompt_token_ids, *chunk.sequence.output_token_ids]
        made["ids"] += [tokens[t] for t in positions]
        made["pos"] += positions
        blocks = chunk.sequence.block_ids
        made["slots"] += [blocks[t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE for t in positions]
        made["seq_lens"].append(positions.stop)
        made["q_start"].append(len(made["ids"]))
    return made


class Checked(StepInputs):
    """A worker's StepInputs, compared with plain ones at every step."""

    num_steps = 0

    def make(
        self, decodes: DecodeBatch, chunks: Sequence[SequenceChunk], rows: Sequence[int], draws: Draws | None = None
    ) -> Inputs:
        made = super().make(decodes, chunks, rows, draws)
        together = [*(SequenceChunk(one, one.num_tokens - 1, 1) for one in decodes), *chunks]
        for name, column in plain_inputs(together).items():
            tensor = made[name]
            assert tensor is not None and tensor.tolist() == column, name
        assert made["rows"] is not None and made["rows"].tolist() == list(rows)
        table = made["block_table"]
        assert table is not None and len(table) == len(together)
        for row, chunk in zip(table.tolist(), together, strict=True):
            used = -(-(chunk.start + chunk.num_tokens) // BLOCK_SIZE)
            assert row[:used] == chunk.sequence.block_ids[:used]
        self.num_steps += 1
        return made


@pytest.mark.parametrize("mode", ["time_share", "hybrid", "strict"])
def test_reused_inputs_equal_fresh_ones(mode: str) -> None:
    config = PDSchedulerConfig(mode=mode, max_prefill_tokens=24, prefill_chunk_size=8, max_decode_batch_size=6)
    llm = LLM(MODEL, scheduler=config, block_size=BLOCK_SIZE, num_kv_blocks=40, max_model_len=96, skip_tokenizer=True)
    executor = llm.engine.executor
    runners = {id(worker): worker.runner for worker in (executor.prefiller, executor.decoder)}.values()
    checks = [Checked(BLOCK_SIZE, 96 // BLOCK_SIZE, llm.model.tables) for _ in runners]
    for runner, check in zip(runners, checks, strict=True):
        runner.step_inputs = check
    prompts = [[10 + i + t for t in range(3 + 5 * i)] for i in (*range(8), 12)]
    params = [SamplingParams(max_tokens=9 + 4 * i, n=2 if i % 3 == 0 else 1, ignore_eos=True) for i in range(9)]
    outputs = llm.generate(prompts, params)
    assert all(len(answer.token_ids) for output in outputs for answer in output.outputs)
    assert sum(check.num_steps for check in checks) > 20


def test_tokens_of_decode_steps_reach_their_sequences_when_these_are_read() -> None:
    one, two = WorkerSequence("one", [1, 2]), WorkerSequence("two", [3], [4])
    batch = DecodeBatch([one, two])
    assert batch.last_token_ids() == [2, 4]
    for step in range(3 * MAX_KEPT_STEPS // 2):
        batch.append([10 + step, 20 + step])
        assert batch.last_token_ids() == [10 + step, 20 + step]
    assert len(one.output_token_ids) == MAX_KEPT_STEPS
    assert [len(sequence.output_token_ids) for sequence in batch] == [96, 97]
    batch[1].output_token_ids.append(5)
    assert batch.last_token_ids() == [10 + 95, 5]
    assert two.output_token_ids == [4, *range(20, 116), 5]
