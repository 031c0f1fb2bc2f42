"""`AsyncLLM`: concurrent requests, cancellation, aborts and errors on an asyncio loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sageLLM import LLM, AsyncLLM, PDSchedulerConfig, SamplingParams
from sageLLM.codegen.driver import PACKAGE
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.errors import PromptError, RequestError

MODEL = Path(PACKAGE, "examples", "tiny_python_model")
PROMPTS = [[5 + i, 6 + i] for i in range(5)]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def shared_llm() -> LLM:
    return LLM(MODEL, dtype="float32", scheduler=PDSchedulerConfig(mode="hybrid"), max_model_len=128)


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[AsyncLLM]:
    yield AsyncLLM(shared_llm)
    for thread in threading.enumerate():
        if thread.name == "sagellm-steps":
            thread.join(60)
    assert not shared_llm.engine.has_work
    shared_llm.engine.scheduler.check_integrity()


async def last(llm: AsyncLLM, prompt: list[int], num_tokens: int) -> RequestOutput:
    outputs = [output async for output in llm.generate(prompt, greedy(num_tokens))]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return outputs[-1]


def test_concurrent_requests_get_the_answers_of_single_calls(llm: AsyncLLM) -> None:
    expected = [output.outputs[0].token_ids for output in llm.llm.generate(PROMPTS, greedy(12))]

    async def main() -> list[RequestOutput]:
        return await asyncio.gather(*(last(llm, prompt, 12) for prompt in PROMPTS))

    assert [output.outputs[0].token_ids for output in asyncio.run(main())] == expected
    assert [output.outputs[0].token_ids for output in asyncio.run(main())] == expected  # on another loop


def test_the_loop_and_threads_share_the_engine(llm: AsyncLLM) -> None:
    expected = [output.outputs[0].token_ids for output in llm.llm.generate(PROMPTS[:2], greedy(12))]

    async def main() -> list[tuple[int, ...]]:
        synchronous = asyncio.to_thread(llm.llm.generate, [PROMPTS[1]], greedy(12))
        output, outputs = await asyncio.gather(last(llm, PROMPTS[0], 12), synchronous)
        return [output.outputs[0].token_ids, outputs[0].outputs[0].token_ids]

    assert asyncio.run(main()) == expected


def test_a_cancelled_task_aborts_its_request(llm: AsyncLLM) -> None:
    async def main() -> None:
        task = asyncio.create_task(last(llm, PROMPTS[0], 120))
        other = asyncio.create_task(last(llm, PROMPTS[1], 6))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await other).finished

    asyncio.run(main())


def test_a_generator_that_is_left_half_way_aborts_its_request(llm: AsyncLLM) -> None:
    async def main() -> None:
        async for _ in llm.generate(PROMPTS[0], greedy(120)):
            break

    asyncio.run(main())


def test_a_request_of_a_closed_loop_is_aborted(llm: AsyncLLM) -> None:
    loop = asyncio.new_event_loop()
    generator = llm.generate(PROMPTS[0], greedy(120))
    assert not loop.run_until_complete(anext(generator)).finished
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    while llm.llm.engine.has_work:  # the thread notices it after its next step
        time.sleep(0.01)


def test_an_abort_yields_the_output_so_far_with_the_reason(llm: AsyncLLM) -> None:
    async def main() -> RequestOutput:
        outputs = []
        async for output in llm.generate(PROMPTS[0], greedy(120), request_id="mine"):
            outputs.append(output)
            await llm.abort("mine")
        return outputs[-1]

    answer = asyncio.run(main()).outputs[0]
    assert (answer.finish_reason, answer.stop_reason) == ("abort", "aborted by the caller")


def test_invalid_requests_raise_in_their_own_generator(llm: AsyncLLM) -> None:
    async def main() -> None:
        with pytest.raises(PromptError):
            await last(llm, [10**6], 1)
        first = llm.generate(PROMPTS[0], greedy(100), request_id="twin")
        await anext(first)
        with pytest.raises(RequestError, match="request_id must differ"):
            await anext(llm.generate(PROMPTS[1], greedy(1), request_id="twin"))
        await first.aclose()

    asyncio.run(main())


def test_embeddings_equal_those_of_the_synchronous_call(llm: AsyncLLM) -> None:
    async def main() -> torch.Tensor:
        return (await llm.embed([PROMPTS[0]], pooling="mean"))[0].embedding

    assert torch.equal(asyncio.run(main()), llm.llm.embed([PROMPTS[0]], pooling="mean")[0].embedding)


def test_options_belong_to_the_llm() -> None:
    with pytest.raises(TypeError, match="options must be passed to the LLM itself"):
        AsyncLLM(LLM.__new__(LLM), dtype="float32")


def test_the_traits_of_a_request_reach_the_scheduler() -> None:
    config = PDSchedulerConfig(mode="hybrid", max_decode_batch_size=1, max_prefill_batch_size=1)
    one_at_a_time = AsyncLLM(MODEL, dtype="float32", scheduler=config, max_model_len=64)
    ends: list[str] = []

    async def ask(name: str, priority: int) -> None:
        traits = {"priority": priority, "deadline": 9.0, "tenant": "t"}
        async for _ in one_at_a_time.generate([5, 6], greedy(6), name, **traits):  # type: ignore[arg-type]
            pass
        ends.append(name)

    async def main() -> None:
        with one_at_a_time.llm.shared.exclusive():  # no step runs until all have been queued
            tasks = [asyncio.create_task(ask(name, priority)) for name, priority in (("a", 2), ("b", 1), ("c", 0))]
            while not all(one_at_a_time.llm.shared.is_live(name) for name in "abc"):
                await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert ends == ["c", "b", "a"]
