"""Offline measurements of `LLM` with random prompts: throughput of many requests, and latency of a batch.

Names, printed lines and JSON keys are those of `vllm bench throughput` and `vllm bench latency`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from sageLLM.runtime.engine.llm import LLM
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.sampling.sampling_params import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens of all requests, and the seconds until the last one was complete."""

    elapsed_time: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int

    def as_data(self) -> dict[str, Any]:
        """vLLM's JSON."""
        total = self.num_prompt_tokens + self.num_output_tokens
        return {
            "elapsed_time": self.elapsed_time,
            "num_requests": self.num_requests,
            "total_num_tokens": total,
            "requests_per_second": self.num_requests / self.elapsed_time,
            "tokens_per_second": total / self.elapsed_time,
        }

    def __str__(self) -> str:
        data = self.as_data()
        return (
            f"Throughput: {data['requests_per_second']:.2f} requests/s, "
            f"{data['tokens_per_second']:.2f} total tokens/s, "
            f"{self.num_output_tokens / self.elapsed_time:.2f} output tokens/s\n"
            f"Total num prompt tokens:  {self.num_prompt_tokens}\n"
            f"Total num output tokens:  {self.num_output_tokens}"
        )


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of each iteration of a batch, from its start to its last token."""

    latencies: Sequence[float]

    def as_data(self) -> dict[str, Any]:
        """vLLM's JSON."""
        values = np.percentile(self.latencies, PERCENTILES).tolist()
        return {
            "avg_latency": float(np.mean(self.latencies)),
            "latencies": list(self.latencies),
            "percentiles": {str(one): value for one, value in zip(PERCENTILES, values, strict=True)},
        }

    def __str__(self) -> str:
        data = self.as_data()
        lines = [f"Avg latency: {data['avg_latency']} seconds"]
        lines += [f"{one}% percentile latency: {value} seconds" for one, value in data["percentiles"].items()]
        return "\n".join(lines)


def measure_throughput(llm: LLM, num_prompts: int, input_len: int, output_len: int, seed: int = 0) -> Throughput:
    """Answers `num_prompts` requests of these lengths, all of which arrive at once."""
    prompts = _prompts(llm, num_prompts, input_len, output_len, seed)
    start = perf_counter()
    outputs = llm.generate(prompts, _params(output_len))
    elapsed = perf_counter() - start
    num_output = sum(len(output.outputs[0].token_ids) for output in outputs)
    return Throughput(elapsed, num_prompts, num_prompts * input_len, num_output)


def measure_latency(
    llm: LLM, batch_size: int, input_len: int, output_len: int, num_warmups: int, num_iters: int, seed: int = 0
) -> Latency:
    """Times a batch of the same lengths `num_iters` times. Its prompts are new each time, so none are cached."""
    times = []
    for i in range(num_warmups + num_iters):
        prompts = _prompts(llm, batch_size, input_len, output_len, seed + i)
        start = perf_counter()
        llm.generate(prompts, _params(output_len))
        times.append(perf_counter() - start)
    return Latency(times[num_warmups:])


def _params(output_len: int) -> SamplingParams:
    return SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)


def _prompts(llm: LLM, num: int, input_len: int, output_len: int, seed: int) -> list[list[int]]:
    if input_len + output_len > llm.model.max_model_len:
        raise SageError(
            f"input_len + output_len must be at most max_model_len={llm.model.max_model_len}, "
            f"got {input_len} + {output_len}"
        )
    prompts: list[list[int]] = np.random.default_rng(seed).integers(0, llm.model.config.V, (num, input_len)).tolist()
    return prompts
