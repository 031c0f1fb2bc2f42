"""Load on a server and its measurement, as `vllm bench serve` does it: arrivals, streams, times of every token."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sageLLM.runtime.server.http_client import Address, Connection, HttpError

Backend = Literal["openai", "openai-chat"]
PATHS: Mapping[Backend, str] = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """Requests and their arrivals. `request_rate` None: all at once; burstiness 1 is a Poisson process."""

    prompts: Sequence[list[int] | str]
    output_len: int
    model: str
    backend: Backend = "openai"
    request_rate: float | None = None
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the bodies."""

    def body(self, prompt: list[int] | str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.output_len,
            "temperature": self.temperature,
            "ignore_eos": self.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
        if self.backend == "openai":
            return body | {"prompt": prompt}
        return body | {"messages": [{"role": "user", "content": prompt}]}


@dataclass(slots=True)
class Outcome:
    """The times of one request, in seconds; `error` is "" if it was complete."""

    start: float = 0.0
    ttft: float = 0.0
    latency: float = 0.0
    itls: list[float] = field(default_factory=list)
    prompt_len: int = 0
    output_len: int = 0
    text: str = ""
    error: str = ""

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first."""
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else 0.0


async def run_load(
    plan: LoadPlan,
    address: Address,
    headers: Mapping[str, str] | None = None,
    on_end: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[list[Outcome], float]:
    """The outcomes in order of the prompts, and the seconds from the first request to the last end."""
    gate = asyncio.Semaphore(plan.max_concurrency or len(plan.prompts) or 1)
    start = time.perf_counter()

    async def one(prompt: list[int] | str) -> Outcome:
        async with gate:
            outcome = await measure(plan, prompt, address, headers)
        on_end(outcome)
        return outcome

    tasks = [asyncio.create_task(one(prompt)) async for prompt in arrivals(plan)]
    outcomes = list(await asyncio.gather(*tasks))
    return outcomes, time.perf_counter() - start


async def arrivals(plan: LoadPlan) -> AsyncIterator[list[int] | str]:
    """The prompts at their times; gaps have a gamma distribution with the shape `burstiness`, as in vLLM."""
    draw = random.Random(plan.seed)
    due = time.perf_counter()
    for prompt in plan.prompts:
        yield prompt
        if plan.request_rate is not None:
            due += draw.gammavariate(plan.burstiness, 1 / (plan.request_rate * plan.burstiness))
            await asyncio.sleep(max(0.0, due - time.perf_counter()))


async def measure(
    plan: LoadPlan, prompt: list[int] | str, address: Address, headers: Mapping[str, str] | None = None
) -> Outcome:
    """Sends one request, and notes the times of its tokens.

    An answer without usage that `max_tokens` has cut has that many tokens.
    """
    outcome = Outcome(start=time.perf_counter())
    last = outcome.start
    num_chunks, is_cut = 0, False
    try:
        async for event in Connection(address, headers).events(PATHS[plan.backend], plan.body(prompt)):
            now = time.perf_counter()
            if (usage := event.get("usage")) is not None:
                outcome.prompt_len, outcome.output_len = usage["prompt_tokens"], usage["completion_tokens"]
            if not event["choices"]:
                continue
            choice = event["choices"][0]
            if choice.get("delta", {}).get("role"):
                continue
            is_cut = choice.get("finish_reason") == "length"
            num_chunks += 1
            if num_chunks == 1:
                outcome.ttft = now - outcome.start
            else:
                outcome.itls.append(now - last)
            last = now
            outcome.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        outcome.latency = last - outcome.start
        if not outcome.output_len and is_cut:
            outcome.output_len = plan.output_len
        if not num_chunks:
            outcome.error = "the stream had no tokens"
    except (HttpError, OSError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
        outcome.latency = time.perf_counter() - outcome.start
    return outcome
