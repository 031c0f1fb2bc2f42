"""Triton kernels in Triton's interpreter, compared with the references; everything runs in one separate process.

The suite runs a random sample of the checks, and a failure names its seed; `make interpret` runs all of them.
"""

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sageLLM.runtime.kernels.triton_interpreter import narrowed, widened

# Importing Triton here would cost a second that the tests do not need: only the other process uses it.
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux"),
    pytest.mark.timeout(900),  # on a busy machine
]

Finding = dict[str, Any]
PROGRAM = Path(__file__).with_name("interpret.py")
EXTENT = "everything" if os.environ.get("SAGELLM_INTERPRET") == "all" else "sample"


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    seed = random.SystemRandom().getrandbits(32)
    done = subprocess.run(
        [sys.executable, PROGRAM, EXTENT, str(seed)], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [{**json.loads(line), "seed": seed} for line in done.stdout.splitlines()]


def test_results_match_the_references(findings: list[Finding]) -> None:
    """Errors are relative to the tolerance."""
    assert [one for one in findings if one["error"] > 1.0] == []


def test_memory_shapes_special_values_and_batch_invariance(findings: list[Finding]) -> None:
    """Also: every kernel was run, the engine generates the right tokens, and the benchmark's dry run works."""
    assert [one for one in findings if one["wrong"]] == []


def test_bf16_rounds_to_nearest_even() -> None:
    import torch

    x = torch.cat((torch.randn(1000) * 10.0 ** torch.randint(-40, 38, (1000,)), torch.tensor([0.0, -0.0, torch.inf])))
    ties = (torch.randint(0, 2**15 - 200, (1000,)) * 65536 + 32768).to(torch.int32).view(torch.float32)
    for numbers in (x, -x, ties):
        rounded = torch.from_numpy(widened(narrowed(numbers.numpy())).copy())
        assert torch.equal(rounded, numbers.bfloat16().float())
