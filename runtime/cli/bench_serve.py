"""`sagellm bench serve`: load on a running server, with the options and the result of `vllm bench serve`."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sageLLM.runtime.cli.bench_serve_options import ServeBench
from sageLLM.runtime.server.http_client import Address, Connection, HttpError
from sageLLM.runtime.server.load import LoadPlan, Outcome, run_load
from sageLLM.runtime.server.report import METRICS, Report

WORDS = [
    "a",
    "be",
    "do",
    "go",
    "he",
    "in",
    "it",
    "me",
    "no",
    "of",
    "on",
    "or",
    "so",
    "to",
    "up",
    "us",
    "we",
    "it",
    "is",
    "if",
]


def bench_serve(bench: ServeBench) -> int:
    """Prints the report; the exit code is 1 if a request has failed, or the server cannot be reached."""
    try:
        report = asyncio.run(_run(bench))
    except (HttpError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report.as_data(), indent=4) if bench.as_json else report)
    if bench.result_filename is not None:
        data = report.as_data(is_detailed=bench.save_detailed)
        bench.result_filename.write_text(json.dumps(data) + "\n", encoding="utf-8")
    failed = [one for one in report.outcomes if one.error]
    for text in sorted({one.error for one in failed})[:5]:
        print(f"error: {text}", file=sys.stderr)
    return 1 if failed else 0


async def _run(bench: ServeBench) -> Report:
    address = Address.of(bench.base_url)
    headers = {} if bench.api_key is None else {"authorization": f"Bearer {bench.api_key}"}
    card = (await Connection(address, headers).json("GET", "/v1/models"))["data"][0]
    plan = LoadPlan(
        prompts=random_prompts(bench, bench.vocab_size or vocab_size_of(card)),
        output_len=bench.random_output_len,
        model=bench.model or card["id"],
        backend=bench.backend,
        request_rate=None if bench.request_rate == float("inf") else bench.request_rate,
        burstiness=bench.burstiness,
        max_concurrency=bench.max_concurrency,
        ignore_eos=bench.ignore_eos,
        temperature=bench.temperature,
        seed=bench.seed,
    )
    outcomes, duration = await run_load(plan, address, headers, _progress(bench))
    rate: float | str = "inf" if plan.request_rate is None else plan.request_rate
    setup: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": bench.backend,
        "model_id": plan.model,
        "tokenizer_id": plan.model,
        "num_prompts": bench.num_prompts,
        "request_rate": rate,
        "burstiness": bench.burstiness,
        "max_concurrency": bench.max_concurrency,
    }
    percentiles = [float(text) for text in bench.metric_percentiles.split(",")]
    return Report(
        outcomes=outcomes,
        duration=duration,
        setup=setup,
        metrics=_metrics(bench.percentile_metrics),
        percentiles=percentiles,
    )


def _metrics(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"percentile_metrics must be of {', '.join(METRICS)}, got {unknown[0]!r}")
    return names


def vocab_size_of(card: dict[str, Any]) -> int:
    """The size in the config of a served checkpoint on this machine. ValueError if it cannot be read."""
    path = Path(str(card.get("root"))) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"expected the vocabulary size in {path}; pass --vocab-size") from None


def random_prompts(bench: ServeBench, vocab_size: int) -> list[list[int] | str]:
    """Random token ids, whose number varies by the share `random_range_ratio`; words for chat."""
    draw = random.Random(bench.seed)
    low = max(1, round(bench.random_input_len * (1 - bench.random_range_ratio)))
    high = max(low, round(bench.random_input_len * (1 + bench.random_range_ratio)))

    def prompt() -> list[int] | str:
        count = draw.randint(low, high)
        if bench.backend == "openai-chat":
            return " ".join(draw.choices(WORDS, k=count))
        return [draw.randrange(vocab_size) for _ in range(count)]

    return [prompt() for _ in range(bench.num_prompts)]


def _progress(bench: ServeBench) -> Callable[[Outcome], None]:
    """A line on a terminal with the number of requests that have ended."""
    num_done = 0

    def count(outcome: Outcome) -> None:
        nonlocal num_done
        num_done += 1
        end = "\n" if num_done == bench.num_prompts else ""
        print(f"\r{num_done}/{bench.num_prompts} requests", end=end, file=sys.stderr, flush=True)

    return count if not bench.disable_tqdm and sys.stderr.isatty() else lambda outcome: None
