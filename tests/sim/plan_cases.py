"""Held cases of the planner: its choice against all other deployments.

    python tests/sim/plan_cases.py [--cases 0:30] [--jobs 2]

Each case is drawn from its number: a model, a device, 2 or 3 of them, lengths of prompts and answers, and an objective.
Each deployment is simulated at several rates above the capacity of the choice, and its own capacity is found if it
meets the objective at one of them. The regret is the capacity of the best deployment, minus that of the choice,
relative to the former.
"""

import argparse
import json
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sageLLM.runtime.cli.plan import search_space
from sageLLM.runtime.cli.plan_request import PlanRequest
from sageLLM.runtime.sim.planner import Search
from sageLLM.runtime.sim.trace import Lengths, TraceRequest, synthetic

LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "max_position_embeddings": 131072}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "8B": LLAMA
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"intermediate_size": 14336},
    "3B": LLAMA
    | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8}
    | {"intermediate_size": 8192},
    "30B-A3B": {"architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "max_position_embeddings": 40960}
    | {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    | {"head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128}
    | {"num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
}
LENGTHS = {  # prompts and answers by median and 90th percentile
    "chat": ((1020, 2734), (129, 424)),
    "code": ((1500, 4900), (13, 80)),
    "long answers": ((300, 900), (400, 900)),
    "long prompts": ((5000, 9000), (180, 350)),
}
OBJECTIVES = [(0.5, 0.03), (0.25, 0.02), (2.0, 0.05), (1.0, 0.015), (0.3, 0.1)]
NUM_REQUESTS = 100


@dataclass(frozen=True)
class Case:
    """One case: the arguments of the planner, and the trace."""

    name: str
    request: PlanRequest
    trace: list[TraceRequest]


def make_case(number: int, folder: Path, num_requests: int = NUM_REQUESTS, num_devices: int | None = None) -> Case:
    """The case of this number, with its config.json in the folder."""
    random = np.random.RandomState(number)
    model = str(random.choice(sorted(MODELS)))
    hardware = str(random.choice(["h100", "a100"]))
    devices = num_devices or int(random.choice([2, 2, 3]))
    kind = str(random.choice(sorted(LENGTHS)))
    ttft, tpot = OBJECTIVES[random.randint(len(OBJECTIVES))]
    (folder / f"{model}.json").write_text(json.dumps(MODELS[model]))
    prompt, output = LENGTHS[kind]
    trace = synthetic(num_requests, 10.0, Lengths(*prompt, 2**15), Lengths(*output, 2**12), number)
    request = PlanRequest(
        model=str(folder / f"{model}.json"),
        hardware=hardware,
        num_devices=devices,
        slo_ttft=ttft,
        slo_tpot=tpot,
        rate=10.0,
        num_requests=num_requests,
        prompt=prompt,
        output=output,
        seed=number,
    )
    return Case(f"{model} on {devices} {hardware}, {kind}, {ttft} s, {tpot} s", request, trace)


@dataclass(frozen=True)
class Outcome:
    """The choice of the planner, and the best of all candidates."""

    chosen: str
    best: str
    regret: float
    num_candidates: int


def outcome(case: Case) -> Outcome | str:
    """The outcome of a case, or the reason why no deployment can meet the objective."""
    found = search_space(case.request, case.trace).candidates()
    candidates = [candidate for candidate, _ in found.values()]
    search = Search(case.trace, case.request.slo, case.request.attainment)
    try:
        [chosen, *_] = search.run(candidates)
    except ValueError as error:
        return str(error)
    best = next(iter(search.better(candidates, chosen)), chosen)
    return Outcome(chosen.candidate.name, best.candidate.name, 1 - chosen.rate / best.rate, len(candidates))


def report(number: int) -> tuple[str, float]:
    """A line about the case of this number, and its regret."""
    started = time.process_time()
    with TemporaryDirectory() as folder:
        case = make_case(number, Path(folder))
        found = outcome(case)
    if isinstance(found, str):
        return f"{number}: {case.name}: {found}", 0.0
    seconds, regret = time.process_time() - started, f"regret {100 * found.regret:.1f} %"
    better = f" (best: {found.best})" if found.regret else ""
    return (
        f"{number}: {case.name}: {found.chosen}; {regret}{better}, {found.num_candidates} candidates, {seconds:.0f} s",
        found.regret,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="0:30", help="numbers FROM:TO")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    first, _, end = options.cases.partition(":")
    worst = 0.0
    with ProcessPoolExecutor(options.jobs) as jobs:
        for line, regret in jobs.map(report, range(int(first), int(end))):
            print(line, flush=True)
            worst = max(worst, regret)
    print(f"largest regret {100 * worst:.1f} %")
    assert worst <= 0.02, "a choice is more than 2 % below the best"


if __name__ == "__main__":
    main()
