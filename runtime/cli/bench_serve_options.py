"""Options of `sagellm bench serve`, which are those of `vllm bench serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from sageLLM.runtime.cli.options import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBench:
    """The options of `sagellm bench serve`."""

    base_url: Annotated[str, Option("URL of a running server.")] = "http://127.0.0.1:8000"
    model: Annotated[str | None, Option("Name of the model (default: the first one served).")] = None
    backend: Annotated[
        Literal["openai", "openai-chat"], Option("Completions of token ids, or chat of random words.")
    ] = "openai"
    num_prompts: Annotated[int, Option("Number of requests.", min=1)] = 1000
    random_input_len: Annotated[int, Option("Tokens of each prompt.", min=1)] = 1024
    random_output_len: Annotated[int, Option("Tokens of each answer.", min=1)] = 128
    random_range_ratio: Annotated[
        float, Option("Input lengths vary by this share in both directions.", min=0, max=1)
    ] = 0.0
    request_rate: Annotated[float, Option("Requests per second; inf sends all at once.")] = float("inf")
    burstiness: Annotated[
        float, Option("Shape of the gamma distribution of arrivals; 1 is a Poisson process.", min=1e-6)
    ] = 1.0
    max_concurrency: Annotated[int | None, Option("Requests under way at once.", min=1)] = None
    ignore_eos: Annotated[bool, Option("Generate all tokens of each answer.")] = True
    temperature: Annotated[float, Option("Sampling temperature; 0 is greedy.")] = 0.0
    seed: Annotated[int, Option("Seed of the random prompts.")] = 0
    vocab_size: Annotated[
        int | None, Option("Prompts have ids below this (default: by the config of the model).", min=1)
    ] = None
    api_key: Annotated[str | None, Option("API key of the server.", environment="SAGELLM_API_KEY")] = None
    percentile_metrics: Annotated[str, Option("Of ttft, tpot, itl, e2el; separated by commas.")] = "ttft,tpot,itl"
    metric_percentiles: Annotated[str, Option("Percentiles, separated by commas.")] = "99"
    result_filename: Annotated[Path | None, Option("Write the result to this file, as JSON.")] = None
    save_detailed: Annotated[bool, Option("Write times and text of every request too.")] = False
    disable_tqdm: Annotated[bool, Option("Show no progress.", "--disable-tqdm")] = False
    as_json: Annotated[bool, Option("Print JSON instead of text.", "--json")] = False
