"""Held cases of the planner: its choice against an exhaustive search.

    python tests/sim/plan_cases.py [--cases 0:30]

Each case is drawn from its number: a model, a device, 2 or 3 of them, lengths of prompts and answers, and an objective.
The regret is the capacity of the best deployment, minus that of the planner's choice, relative to the former.
"""

import argparse
import json
import time
from collections.abc import Mapping
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
    """The choice of the planner, the best by exhaustive search, and the simulated requests of both."""

    chosen: str
    best: str
    regret: float
    num_candidates: int
    effort: float


def outcome(case: Case) -> Outcome | str:
    """The outcome of a case, or the reason why no deployment can meet the objective."""
    found = search_space(case.request, case.trace).candidates()
    candidates = [candidate for candidate, _ in found.values()]
    search, full = (Search(case.trace, case.request.slo, case.request.attainment) for _ in range(2))
    try:
        [chosen, *_] = search.run(candidates)
    except ValueError as error:
        return str(error)
    ranked = full.exhaustive(candidates)
    rates = {one.candidate.name: one.rate for one in ranked}
    regret = 1 - rates[chosen.candidate.name] / ranked[0].rate
    effort = search.num_simulated / full.num_simulated
    return Outcome(chosen.candidate.name, ranked[0].candidate.name, regret, len(candidates), effort)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="0:30", help="numbers FROM:TO")
    first, _, end = parser.parse_args().cases.partition(":")
    worst = 0.0
    with TemporaryDirectory() as folder:
        for number in range(int(first), int(end)):
            started = time.perf_counter()
            case = make_case(number, Path(folder))
            found = outcome(case)
            if isinstance(found, str):
                print(f"{number}: {case.name}: {found}", flush=True)
                continue
            worst = max(worst, found.regret)
            seconds = time.perf_counter() - started
            print(
                f"{number}: {case.name}: {found.chosen}; regret {100 * found.regret:.1f} %, "
                f"{found.num_candidates} candidates, effort {100 * found.effort:.0f} %, {seconds:.0f} s",
                flush=True,
            )
    print(f"largest regret {100 * worst:.1f} %")
    assert worst <= 0.02, "a choice is more than 2 % below the best"


if __name__ == "__main__":
    main()
