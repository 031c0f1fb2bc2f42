"""Compares attention and FFN workers with one process, and kills FFN workers at random points.

    python tests/parallel/af_matrix.py [--only TEXT] [--kills 5]

Each row runs a layout of the oracle tests in float32 with numbers of workers, micro-batches, a mode and kernels, and
prints "equal" or the first difference. While the answers are generated, an FFN worker drawn at random is killed
`--kills` times; the attention workers must stay. `make af-matrix` runs all rows, which takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from tests.conftest import save_random_model, small_config
from tests.parallel.layouts import PROMPTS, cases

GREEDY = SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=48, n=2, temperature=1.0, seed=1, ignore_eos=True)


class Row(NamedTuple):
    """A case of the matrix."""

    layout: str
    af: str
    num_ubatches: int
    mode: str
    kernels: str = "auto"
    enable_expert_parallel: bool = False


ROWS = [
    Row("llama", "1:1", 1, "hybrid"),
    Row("llama", "1:1", 2, "strict"),
    Row("llama", "1:1", 3, "time_share"),
    Row("llama", "1:1", 4, "hybrid"),
    *(Row("llama", af, 2, "hybrid") for af in ("2:1", "3:2", "1:2", "2:3")),
    *(Row("mixtral", af, 2, "strict") for af in ("2:1", "3:2")),
    Row("deepseek_v2", "2:1", 3, "hybrid"),
    *(Row("llama", af, 2, "hybrid") for af in ("1:1x2", "2:1x2", "1:2x2")),
    Row("gpt2", "1:1x2", 1, "time_share"),
    Row("mixtral", "2:1x2", 2, "strict"),
    Row("qwen2_moe", "2:1x2", 2, "hybrid", "auto", True),
    Row("deepseek_v2", "1:1x2", 2, "hybrid", "auto", True),
    Row("bloom", "1:1", 2, "time_share", "reference"),
    Row("mixtral", "2:1", 1, "hybrid", "reference"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows with this text")
    parser.add_argument("--kills", type=int, default=0, help="FFN workers to kill in each row")
    options = parser.parse_args()
    failed = 0
    for row in ROWS:
        text = " ".join(map(str, row))
        if options.only in text:
            found = compare(row, options.kills)
            failed += found != "equal"
            print(f"{text:<45} {found}", flush=True)
    sys.exit(failed > 0)


def compare(row: Row, kills: int) -> str:
    family, config = next((family, config) for name, family, config in cases(row.layout) if name == row.layout)
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder), family, 0, "5GB", small_config(config))
        expected = answers(llm := load(folder, row))
        llm.close()
        experts = {"enable_expert_parallel": row.enable_expert_parallel}
        llm = load(folder, row, af=row.af, num_ubatches=row.num_ubatches, **experts)
        workers = llm._ffn_workers
        assert workers is not None
        stop, killed = threading.Event(), [0]
        thread = threading.Thread(target=kill_some, args=(workers, kills, stop, killed))
        thread.start()
        try:
            found = answers(llm)
            while killed[0] < kills and found == expected:
                found = answers(llm)
        finally:
            stop.set()
            thread.join()
            llm.close()
    return "equal" if found == expected else f"expected {expected}, got {found}"


def load(folder: str, row: Row, **options: Any) -> LLM:
    config = PDSchedulerConfig(mode=row.mode, prefill_chunk_size=16)
    kernels: Any = row.kernels
    return LLM(folder, dtype="float32", skip_tokenizer=True, scheduler=config, kernels=kernels, **options)


def answers(llm: LLM) -> list[tuple[int, ...]]:
    outputs = [output for params in (GREEDY, DRAWN) for output in llm.generate(PROMPTS, params)]
    return [answer.token_ids for output in outputs for answer in output.outputs]


def kill_some(workers: Any, kills: int, stop: threading.Event, killed: list[int]) -> None:
    """Kills FFN workers, each time after all have been started again."""
    draw = random.Random(0)
    while killed[0] < kills and not stop.wait(draw.uniform(0.02, 1.5)):
        if workers.num_restarts == killed[0]:
            killed[0] += 1
            os.kill(draw.choice(workers.process_ids), signal.SIGKILL)


if __name__ == "__main__":
    main()
