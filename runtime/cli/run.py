"""`sagellm run` completes prompts with a checkpoint; `sagellm embed` prints the embeddings of texts."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sageLLM.runtime.engine.llm import LLM
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.engine.sampling_params import SamplingParams
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig


@dataclass(frozen=True, slots=True)
class RunRequest:
    """The arguments of `sagellm run`."""

    model: Path
    prompts: Sequence[str]
    max_tokens: int
    temperature: float
    seed: int | None
    pd: Any
    dtype: str
    kernels: Any
    max_model_len: int | None
    plugins: Sequence[Path]
    as_json: bool


def run_prompts(request: RunRequest) -> int:
    """Prints the completions to stdout; an error goes to stderr, with exit code 1."""
    try:
        params = SamplingParams(max_tokens=request.max_tokens, temperature=request.temperature, seed=request.seed)
        llm = LLM(
            request.model,
            dtype=request.dtype,
            kernels=request.kernels,
            scheduler=PDSchedulerConfig(mode=request.pd),
            max_model_len=request.max_model_len,
            plugins=request.plugins,
        )
        outputs = llm.generate(list(request.prompts), params)
    except (SageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for output in outputs:
        print(json.dumps(_as_data(output)) if request.as_json else f"{output.prompt}{output.outputs[0].text}")
    return 0


def _as_data(output: RequestOutput) -> dict[str, Any]:
    answer, metrics = output.outputs[0], output.metrics
    return {
        "prompt": output.prompt,
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
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
    dtype: str
    kernels: Any
    max_model_len: int | None
    plugins: Sequence[Path]


def embed_prompts(request: EmbedRequest) -> int:
    """Prints one JSON line per prompt to stdout; an error goes to stderr, with exit code 1."""
    try:
        llm = LLM(
            request.model,
            dtype=request.dtype,
            kernels=request.kernels,
            max_model_len=request.max_model_len,
            plugins=request.plugins,
        )
        outputs = llm.embed(list(request.prompts), pooling=request.pooling, normalize=request.normalize)
    except (SageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for output in outputs:
        print(json.dumps({"prompt": output.prompt, "embedding": output.embedding.tolist()}))
    return 0
