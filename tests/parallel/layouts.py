"""Compares ranks with one process, for the cases of the oracle tests: tokens and log-probabilities.

    python tests/parallel/layouts.py [--only TEXT] [--modes hybrid,time_share,strict] [--degrees 2x1,1x2]
                                       [--expert-parallel] [--num-ubatches 2] [--part 1/4]

Each case runs in float32 in the given modes and degrees (tensor-parallel ranks x pipeline stages);
`make parallel-layouts` runs all of them in all modes: 684 comparisons of about a second. A case with sizes that the
degree does not divide is listed as refused. `--part I/N` runs every N-th case, from the I-th on.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).parents[2]))
conftest = importlib.import_module("tests.conftest")
MODULES = ("test_oracle", "test_oracle_experts", "test_oracle_recent")
PROMPTS = [[3, 5, 8], [7], [11 + i for i in range(33)], [2 + (i * 7) % 190 for i in range(70)]]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=12, temperature=1.0, seed=1, logprobs=0, ignore_eos=True)
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--modes", default="hybrid")
    parser.add_argument("--degrees", default="2x1,1x2")
    parser.add_argument("--expert-parallel", action="store_true", help="with whole experts on each rank")
    parser.add_argument("--num-ubatches", type=int, default=1, help="micro-batches of each step")
    parser.add_argument("--part", default="1/1")
    options = parser.parse_args()
    failed, (first, step) = 0, map(int, options.part.split("/"))
    for name, family, config in list(cases(options.only))[first - 1 :: step]:
        for mode in options.modes.split(","):
            degrees = options.degrees.split(",")
            more = {"enable_expert_parallel": options.expert_parallel, "num_ubatches": options.num_ubatches}
            for degree, found in zip(degrees, compare(family, config, mode, degrees, **more), strict=True):
                failed += found not in ("equal", "refused", "no experts")
                print(f"{name:<60} {mode:<12} {degree} {found}", flush=True)
    sys.exit(failed > 0)


def cases(only: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The cases with the text in their names, with a vocabulary that two divides."""
    for module in MODULES:
        for name, (family, config) in importlib.import_module(f"tests.engine.{module}").CASES.items():
            if only in name:
                yield name, family, {"vocab_size": 200} | config


def compare(family: str, config: dict[str, Any], mode: str, degrees: Sequence[str], **options: Any) -> list[str]:
    """For each degree "equal", "refused" or "no experts" for a model that cannot be divided, or the first difference.

    `options` are further arguments of the LLM with several ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        conftest.save_random_model(Path(folder), family, 0, "5GB", conftest.small_config(config))
        alone = _answers(LLM(folder, **_options(mode)))
        return [_compare(folder, alone, degree, **_options(mode), **options) for degree in degrees]


def _compare(folder: str, alone: "Answers", degree: str, **options: Any) -> str:
    tp, pp = map(int, degree.split("x"))
    try:
        llm = LLM(folder, tensor_parallel_size=tp, pipeline_parallel_size=pp, **options)
    except CheckpointError as error:
        if "requires a model with experts" in str(error):
            return "no experts"
        return "refused" if "does not divide" in str(error) else str(error)
    try:
        return _difference(_answers(llm), alone)
    finally:
        llm.close()


def _options(mode: str) -> dict[str, Any]:
    config = PDSchedulerConfig(mode=mode, prefill_chunk_size=16)  # type: ignore[arg-type]
    return {"dtype": "float32", "skip_tokenizer": True, "max_model_len": 128, "scheduler": config, "block_size": 4}


Answers = list[tuple[tuple[int, ...], list[float]]]


def _answers(llm: LLM) -> Answers:
    found = []
    for params in (GREEDY, DRAWN):
        for output in llm.generate(PROMPTS, params):
            entries = [*(output.prompt_logprobs or ())[1:], *(output.outputs[0].logprobs or ())]
            values = [next(iter(entry.values())).logprob for entry in entries if entry]
            found.append((output.outputs[0].token_ids, values))
    return found


def _difference(found: Answers, expected: Answers) -> str:
    for i, ((tokens, logprobs), (wanted, wanted_logprobs)) in enumerate(zip(found, expected, strict=True)):
        if tokens != wanted:
            return f"answer {i} has other tokens"
        error = max((abs(a - b) for a, b in zip(logprobs, wanted_logprobs, strict=True)), default=0.0)
        if error > TOLERANCE:
            return f"answer {i} has log-probabilities that differ by {error:.1e}"
    return "equal"


if __name__ == "__main__":
    main()
