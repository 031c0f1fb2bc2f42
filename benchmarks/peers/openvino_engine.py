"""OpenVINO GenAI's continuous batching, on a model that optimum-intel has exported."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from workloads import Ask, Complete

CACHE_GB = 2


def export(folder: Path) -> None:
    """Writes the model next to the checkpoint in OpenVINO's format, weights in bfloat16, unless it exists."""
    target = folder / "openvino"
    if (target / "openvino_model.xml").exists():
        return
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(folder)]
    command += ["--task", "text-generation-with-past", "--weight-format", "fp16", str(target)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def load(folder: Path, threads: int) -> Complete:
    """Answers over a paged cache of CACHE_GB, the scheduler's other settings as they come."""
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    options = {"INFERENCE_NUM_THREADS": threads}
    pipe = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", options)

    def complete(asks: Sequence[Ask]) -> list[list[int]]:
        configs = [
            genai.GenerationConfig(max_new_tokens=ask.num_new, min_new_tokens=ask.num_new, ignore_eos=True)
            for ask in asks
        ]
        prompts = [openvino.Tensor(np.array([ask.prompt], dtype=np.int64)) for ask in asks]
        return [list(answer.m_generation_ids[0]) for answer in pipe.generate(prompts, configs)]

    return complete
