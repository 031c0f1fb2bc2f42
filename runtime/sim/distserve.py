"""Reads DistServe's published latency profiles (arXiv 2401.09670), to reproduce the results of its simulator."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sageLLM.runtime.scheduler.step_cost import CoefficientCost, Coefficients
from sageLLM.runtime.sim.trace import TraceError

PREFILL_STAGE_MS = 1.0
RAY_OVERHEAD_MS = (2.0, 1e-4)
"""The constant and per-token overhead of inter-process calls that DistServe's simulator adds to every step."""


def read_profile(path: Path, model: str, tensor_parallel_size: int = 1) -> CoefficientCost:
    """The cost model of a DistServe profile (`{model: {tp: {prefill, decoding_smallbs, ...}}}`, milliseconds).

    The overhead of its simulator counts the context of a decode without the new token. Ours counts it, so one token's
    overhead is subtracted from the per-request term of decodes. Raises TraceError with the entry that is missing.
    """
    try:
        profile: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fitted = profile[model][str(tensor_parallel_size)]
        return CoefficientCost(_coefficients(fitted))
    except KeyError as error:
        raise TraceError(f"{path}: expected an entry {error} for model {model}, tp {tensor_parallel_size}") from None
    except (ValueError, TypeError) as error:
        raise TraceError(f"{path}: expected a latency profile: {error}") from None


def _coefficients(fitted: Mapping[str, Any]) -> Coefficients:
    a, b, c = fitted["prefill"]
    return Coefficients(
        prefill=(a + PREFILL_STAGE_MS, b, c),
        small_decode=_decode(*fitted["decoding_smallbs"]),
        large_decode=_decode(*fitted["decoding_largebs"]),
        threshold=int(fitted["decoding_large_small_bs_threshold"]),
        prefill_overhead=RAY_OVERHEAD_MS,
        decode_overhead=RAY_OVERHEAD_MS,
    )


def _decode(a: float, b: float, c: float) -> tuple[float, float, float]:
    return a, b, c - RAY_OVERHEAD_MS[1]
