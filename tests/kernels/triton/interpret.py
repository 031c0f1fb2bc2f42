"""Runs the checks of the Triton kernels in Triton's interpreter, and prints each finding as a line of JSON.

Runs in a separate process, because TRITON_INTERPRET must be set before Triton is imported.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import checks
import numpy as np
import torch

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.kernels.triton_interpreter import patch_bf16

MODEL = Path(__file__).parents[3] / "examples/tiny_python_model"


def engine_findings() -> Iterator[checks.Finding]:
    """The engine generates the same tokens with Triton kernels as with the references, in bf16."""
    tokens = []
    for kernels in ("reference", "triton"):
        llm = LLM(model=MODEL, kernels=kernels)
        [request] = llm.generate(["import os\nimport "], SamplingParams(max_tokens=3, temperature=0.0))
        tokens.append(request.outputs[0].token_ids)
    yield checks.Finding("engine", str(tokens), "bf16", 0.0, "" if tokens[0] == tokens[1] else "other tokens")


def main() -> None:
    np.seterr(all="ignore")
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    patch_bf16()
    for finding in (*checks.findings(), *engine_findings()):
        json.dump(asdict(finding), sys.stdout)
        print()


if __name__ == "__main__":
    main()
