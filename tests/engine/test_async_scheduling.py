"""Planning ahead: the answers of random traffic are those of the synchronous engine, and of each request alone."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.engine.outputs import RequestOutput

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"
EOS = 0


def load(mode: str, *, async_scheduling: bool, **options: Any) -> LLM:
    config = PDSchedulerConfig(
        mode=mode, max_prefill_tokens=24, prefill_chunk_size=8, max_decode_batch_size=6, max_prefill_batch_size=6
    )
    return LLM(
        MODEL,
        dtype="float32",
        scheduler=config,
        block_size=4,
        max_model_len=96,
        skip_tokenizer=True,
        async_scheduling=async_scheduling,
        **options,
    )


def requests(random: Random, num: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of which some share a prefix, with all kinds of parameters that affect the loop of steps."""
    prefix = [random.randrange(3, 800) for _ in range(20)]
    made = []
    for _ in range(num):
        prompt = prefix[: random.choice((0, 8, 20))] + [random.randrange(3, 800) for _ in range(random.randint(1, 30))]
        greedy = random.random() < 0.5
        n = 1 if greedy else random.choice((1, 1, 3))
        params = SamplingParams(
            n=n,
            temperature=0.0 if greedy else 1.0,
            seed=random.randrange(1000),
            max_tokens=random.randint(1, 30),
            # Stop ids end answers at random points, after which a step that was planned ahead has a token too many.
            stop_token_ids=[random.randrange(800) for _ in range(60)],
            min_tokens=0,
            ignore_eos=random.random() < 0.5,
            logprobs=random.choice((None, 2)),
            prompt_logprobs=random.choice((None, None, 1)),
            presence_penalty=random.choice((0.0, 0.5)),
        )
        made.append((prompt, params))
    return made


def serve(llm: LLM, random: Random, made: list[tuple[list[int], SamplingParams]]) -> dict[str, RequestOutput]:
    """Serves the requests, which arrive at random steps; some are aborted, and not returned."""
    engine, done = llm.engine, {}
    waiting = [(str(i), *request) for i, request in enumerate(made)]
    aborted = {str(i) for i in range(len(made)) if random.random() < 0.15}
    while waiting or engine.has_work:
        while waiting and random.random() < 0.4:
            name, prompt, params = waiting.pop(0)
            engine.add(name, None, prompt, params)
        if aborted and random.random() < 0.05:
            engine.abort(aborted.pop())
        if engine.has_work:
            done |= {output.request_id: output for output in engine.step() if output.finished}
    engine.scheduler.check_integrity()
    assert engine.scheduler.get_stats()["kv_blocks_used"] == 0
    return done


POOLS = {
    "roomy": {},
    "tight": {"num_kv_blocks": 40},
    "swap": {"num_kv_blocks": 40, "swap_space": 0.01},
    "no prefix cache": {"num_kv_blocks": 60, "enable_prefix_caching": False},
}


@pytest.mark.parametrize(
    ("mode", "pool"),
    [
        *(("hybrid", pool) for pool in POOLS),
        ("time_share", "roomy"),
        ("time_share", "swap"),
        ("strict", "tight"),
        ("strict", "no prefix cache"),
        ("auto", "tight"),
    ],
)
def test_answers_equal_those_of_the_synchronous_engine(mode: str, pool: str) -> None:
    ahead, in_turn = (load(mode, async_scheduling=is_async, **POOLS[pool]) for is_async in (True, False))
    num_preemptions = 0
    for seed in range(2):
        made = requests(Random(seed), 14)
        found = serve(ahead, Random(seed), made)
        expected = serve(in_turn, Random(seed + 100), made)
        both = found.keys() & expected.keys()
        assert len(both) > 5
        for name in both:
            assert_same(found[name], expected[name])
        num_preemptions += ahead.engine.scheduler.get_stats()["total_preemptions"]
    assert num_preemptions or pool in ("roomy", "no prefix cache") or mode == "strict"


def assert_same(found: RequestOutput, expected: RequestOutput) -> None:
    for answer, other in zip(found.outputs, expected.outputs, strict=True):
        assert answer.token_ids == other.token_ids
        assert (answer.finish_reason, answer.stop_reason) == (other.finish_reason, other.stop_reason)
        assert (answer.logprobs is None) == (other.logprobs is None)
        if answer.cumulative_logprob is not None:
            assert answer.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)
    assert (found.prompt_logprobs is None) == (expected.prompt_logprobs is None)
    if found.prompt_logprobs is not None and expected.prompt_logprobs is not None:
        assert [entry and entry.keys() for entry in found.prompt_logprobs[1:]]
        for entry, other_entry in zip(found.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
            assert entry is not None and other_entry is not None
            assert {i: round(x.logprob, 2) for i, x in entry.items()} == pytest.approx(
                {i: x.logprob for i, x in other_entry.items()}, abs=1e-2
            )


def test_a_step_is_planned_while_another_runs() -> None:
    """The order of step n + 1 is submitted before the result of step n is read, and in the synchronous engine after."""
    for is_async, num_ahead in ((True, 1), (False, 0)):
        llm = load("hybrid", async_scheduling=is_async)
        submit, submitted = llm.engine.executor.submit, []
        llm.engine.executor.submit = lambda order, submit=submit, made=submitted: made.append(order) or submit(order)  # type: ignore[method-assign]
        llm.engine.add("a", None, [5, 6, 7], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
        for num_steps in range(1, 6):
            llm.engine.step()
            assert len(submitted) == num_steps + num_ahead
        steady = submitted[-1].decode
        assert steady.has_decodes and steady.decodes is None, "a steady step names no sequences"
        assert not (steady.new or steady.chunks or steady.dropped)
