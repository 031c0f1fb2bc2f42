"""Reads DistServe's published latency profiles, with which its own simulator can be repeated."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sageLLM.runtime.scheduler.step_cost import CoefficientCost, Coefficients
from sageLLM.runtime.sim.trace import TraceError

PREFILL_STAGE_MS = 1.0
RAY_OVERHEAD_MS = (2.0, 1e-4)
"""What DistServe's simulator adds to every step, constant and per context token, for the calls between processes."""


def read_profile(path: Path, model: str, tensor_parallel_size: int = 1) -> CoefficientCost:
    """The cost model of a DistServe profile (`{model: {tp: {prefill, decoding_smallbs, ...}}}`, milliseconds).

    Its simulator counts the tokens before a decode without the new one in the overhead, so a decode's share is taken
    off its per-request term. Raises TraceError naming what the file lacks.
    """
    try:
        profile: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fitted = profile[model][str(tensor_parallel_size)]
        return CoefficientCost(_coefficients(fitted))
    except KeyError as error:
        raise TraceError(f"{path}: has no {error} for model {model}, tp {tensor_parallel_size}") from None
    except (ValueError, TypeError) as error:
        raise TraceError(f"{path}: is not a latency profile: {error}") from None


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
