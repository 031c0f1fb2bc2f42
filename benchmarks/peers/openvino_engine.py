"""OpenVINO GenAI's continuous batching, on a model that optimum-intel has exported."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from workloads import Ask, Complete

CACHE_GB = 2
MAX_BATCHED_TOKENS = 4096
"""The default, 256, limits prefill."""


def export(folder: Path, form: str) -> None:
    """Writes `openvino-FORM` next to the checkpoint, weights in fp16 or int8, unless it exists."""
    target = folder / f"openvino-{form}"
    if (target / "openvino_model.bin").exists():
        return
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(folder)]
    command += ["--task", "text-generation-with-past", "--weight-format", form, str(target)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def load(folder: Path, kv: str, threads: int) -> Complete:
    """Answers over a paged cache of CACHE_GB. Arithmetic is in bfloat16, and the cache in `kv`."""
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
    scheduler.enable_prefix_caching = False
    # Without AVX-512 the plugin has no bfloat16 products, and refuses the hint.
    precision = "f32" if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2" else "bf16"
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": kv,
    }
    pipe = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", options)

    def complete(asks: Sequence[Ask]) -> list[list[int]]:
        configs = [
            genai.GenerationConfig(max_new_tokens=ask.num_new, min_new_tokens=ask.num_new, ignore_eos=True)
            for ask in asks
        ]
        prompts = [openvino.Tensor(np.array([ask.prompt], dtype=np.int64)) for ask in asks]
        return [list(answer.m_generation_ids[0]) for answer in pipe.generate(prompts, configs)]

    return complete
