"""`sagellm run` completes prompts with a checkpoint; `sagellm embed` prints the embeddings of texts."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sageLLM.runtime.cli.engine_options import EngineOptions
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.errors import EngineError, SageError
from sageLLM.runtime.sampling.sampling_params import SamplingParams

if TYPE_CHECKING:
    from sageLLM.runtime.engine.llm import LLM


@dataclass(frozen=True, slots=True)
class RunRequest:
    """The arguments of `sagellm run`."""

    model: Path
    prompts: Sequence[str]
    max_tokens: int
    temperature: float
    seed: int | None
    engine: EngineOptions
    as_json: bool
    profile: bool = False
    hardware: str | None = None
    verbose: bool = False


def run_prompts(request: RunRequest) -> int:
    """Prints the completions to stdout. Errors go to stderr, with exit code 1, also if only one prompt has failed.

    With `profile`, the time of each op, its fraction of the machine's limit, and the io of tiers are printed to stderr;
    with `verbose`, the weights by form and kernel.
    """
    try:
        params = SamplingParams(max_tokens=request.max_tokens, temperature=request.temperature, seed=request.seed)
        llm = request.engine.load(request.model, **_UNCACHED if request.profile else {})
        print(llm.kv_cache_size, file=sys.stderr)
        if llm.compiler.weight_stream is not None:
            print(llm.compiler.weight_stream, file=sys.stderr)
        for one in llm.weight_stats() if request.verbose else ():
            print(one, file=sys.stderr)
        if request.profile:
            outputs = _generate_profiled(llm, request, params)
        else:
            outputs = llm.generate(list(request.prompts), params)
    except (SageError, EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for output in outputs:
        if request.as_json:
            print(json.dumps(_as_data(output)))
        elif output.outputs[0].text or output.outputs[0].finish_reason != "abort":
            print(f"{output.prompt}{output.outputs[0].text}")
    return _report_aborted(outputs)


_UNCACHED: dict[str, Any] = {"enable_prefix_caching": False}
"""For a profile, which computes the prompts twice."""


def _generate_profiled(llm: "LLM", request: RunRequest, params: SamplingParams) -> list[RequestOutput]:
    """Generates twice, since the first time allocates memory, and prints the profile of the second time."""
    from sageLLM.runtime.bench.machine import this_machine
    from sageLLM.runtime.bench.profile import profiled
    from sageLLM.runtime.cli.hardware_entry import find_hardware
    from sageLLM.runtime.kernels.cpu.compiler import CompileError

    try:
        hardware = this_machine() if request.hardware is None else find_hardware(request.hardware)
    except (ValueError, CompileError) as error:
        raise SageError(str(error)) from None
    prompts = list(request.prompts)
    llm.generate(prompts, params)
    with profiled(llm, hardware) as profile:
        outputs = llm.generate(prompts, params)
    print(profile.table(), file=sys.stderr)
    for report in llm.io_stats():
        print(report, file=sys.stderr)
    return outputs


def _report_aborted(outputs: Sequence[RequestOutput]) -> int:
    """Prints the reasons of prompts without a complete answer to stderr; returns the exit code."""
    aborted = [(number, output.outputs[0]) for number, output in enumerate(outputs, start=1)]
    aborted = [(number, answer) for number, answer in aborted if answer.finish_reason == "abort"]
    for number, answer in aborted:
        print(f"error: prompt {number} was aborted: {answer.stop_reason}", file=sys.stderr)
    return 1 if aborted else 0


def _as_data(output: RequestOutput) -> dict[str, Any]:
    answer, metrics = output.outputs[0], output.metrics
    return {
        "prompt": output.prompt,
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "ttft_s": metrics.ttft if metrics else None,
        "tpot_s": metrics.tpot if metrics else None,
    }


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """The arguments of `sagellm embed`; `pooling` and `normalize` default to the checkpoint's settings."""

    model: Path
    prompts: Sequence[str]
    pooling: Any
    normalize: bool | None
    prompt_name: str | None
    engine: EngineOptions


def embed_prompts(request: EmbedRequest) -> int:
    """Prints one JSON line per prompt to stdout; an error goes to stderr, with exit code 1."""
    try:
        llm = request.engine.load(request.model)
        outputs = llm.embed(
            list(request.prompts),
            pooling=request.pooling,
            normalize=request.normalize,
            prompt_name=request.prompt_name,
        )
    except (SageError, EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for output in outputs:
        print(json.dumps({"prompt": output.prompt, "embedding": output.embedding.tolist()}))
    return 0
