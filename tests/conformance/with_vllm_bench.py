"""`vllm bench serve`: random prompts at a rate, all of which must be completed.

The program's module is called, since its command looks for a package `vllm`, which the CPU build is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm.benchmarks.serve import add_cli_args, main

NUM_PROMPTS = 100


def arguments(url: str, model: str) -> Sequence[str]:
    options = {"num-prompts": NUM_PROMPTS, "random-input-len": 64, "random-output-len": 32, "request-rate": 20}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    names = ["--model", "tiny", "--tokenizer", model, "--dataset-name", "random", "--ignore-eos"]
    return ["--backend", "openai", "--base-url", url, *names, *flags]


parser = argparse.ArgumentParser()
add_cli_args(parser)
result = main(parser.parse_args(arguments(*sys.argv[1:3])))
assert (result["completed"], result["failed"]) == (NUM_PROMPTS, 0), result
