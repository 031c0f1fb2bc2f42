"""Command `sagellm quantize`: writes a quantised copy of a checkpoint folder."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from sageLLM.runtime.cli.progress import show_progress
from sageLLM.runtime.core.printable import printable
from sageLLM.runtime.errors import MAX_MESSAGE_LEN, CheckpointError, SageError

if TYPE_CHECKING:
    from sageLLM.runtime.quantize.checkpoint import Quantised

Method = Literal["nearest", "gptq"]


@dataclass(frozen=True, slots=True)
class QuantizeRequest:
    """The arguments of `sagellm quantize`."""

    model: Path
    out: Path
    format: str
    method: Method
    calibration: Path | None
    num_samples: int
    sample_len: int
    include_head: bool


def quantize(request: QuantizeRequest) -> int:
    """Prints the number of weights, and the progress to a terminal. Exit code 1: an error."""
    start = time.monotonic()
    try:
        found = _write(request)
    except (SageError, OSError) as error:
        print(f"error: {printable(str(error), MAX_MESSAGE_LEN)}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    print(f"{request.out}: {found.num_weights} weights in {request.format}, written in {seconds:.1f} s")
    if found.errors:
        own, nearest = (
            fmean(getattr(one, kind) for one in found.errors.values()) for kind in ("compensated", "nearest")
        )
        print(f"mean relative error of layer outputs: {own:.2e}, rounded to nearest {nearest:.2e}")
    return 0


def _write(request: QuantizeRequest) -> Quantised:
    from sageLLM.runtime.quantize.checkpoint import quantize_checkpoint  # torch, only for this
    from sageLLM.runtime.quantize.scheme import Scheme
    from sageLLM.runtime.registry.plugins import load_registry

    registry = load_registry()
    return quantize_checkpoint(
        request.model,
        request.out,
        Scheme.parse(request.format, registry.methods),
        registry,
        sequences=_sequences(request),
        include_head=request.include_head,
        progress=show_progress,
    )


def _sequences(request: QuantizeRequest) -> list[list[int]] | None:
    """The token sequences of the calibration text."""
    if request.method == "nearest":
        if request.calibration is not None:
            raise CheckpointError("--calibration requires --method gptq")
        return None
    if request.calibration is None:
        raise CheckpointError("--method gptq requires --calibration FILE, a text like those that the model will read")
    from sageLLM.runtime.quantize.calibration import sequences_of
    from sageLLM.runtime.text.tokenizer import Tokenizer

    text = request.calibration.read_text(encoding="utf-8", errors="replace")
    found = sequences_of(text, Tokenizer.from_folder(request.model).encode, request.sample_len, request.num_samples)
    if not found:
        raise CheckpointError(f"{request.calibration} must have text, got an empty file")
    return found
