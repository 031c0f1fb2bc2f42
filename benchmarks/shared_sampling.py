"""Measures sampling from a vocabulary that ranks of one host share: with candidates, and with all logits gathered.

    python benchmarks/shared_sampling.py [--ranks 2] [--rounds 200] [--vocab 49152] [--rows 1,16]

Prints for each kind of parameters the bytes that a rank sends per row, and the median microseconds of a step on one
thread per rank. The logits fall with the logarithm of their place (Zipf's law), in random order. The times are of use
only on a machine with an idle core for each rank.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sageLLM.runtime.kernels.cpu.communicator import gather_bytes, make_shared_memory, open_communicator
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.sampling.sampler import SamplingBatch, SequenceSampling, sample
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.sampling.share import Share
from sageLLM.runtime.sampling.shared_sampler import sample_shared

KINDS = {
    "temperature 1": SamplingParams(seed=1),
    "top-k 50": SamplingParams(seed=1, top_k=50),
    "top-p 0.9": SamplingParams(seed=1, top_p=0.9),
    "top-k 50, top-p 0.9": SamplingParams(seed=1, top_k=50, top_p=0.9),
    "min-p 0.05": SamplingParams(seed=1, min_p=0.05),
    "greedy, 5 log-probabilities": SamplingParams(temperature=0.0, logprobs=5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rows", default="1,16")
    parser.add_argument("--rank", type=int, help="used by the program itself")
    parser.add_argument("--memory", type=int)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options)
        return
    memory = make_shared_memory(options.ranks)
    command = [sys.executable, __file__, *sys.argv[1:], f"--memory={memory}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, f"--rank={rank}"], pass_fds=[memory], env=environment)
        for rank in range(options.ranks)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(1)


def run_rank(options: argparse.Namespace) -> None:
    open_communicator(options.memory, options.rank, options.ranks, find_compiler())
    torch.set_num_threads(1)
    width = options.vocab // options.ranks
    share = Share(options.rank * width, width, width * options.ranks, options.ranks, gather_bytes)
    if options.rank == 0:
        print(f"{'':38}{'bytes per row':>28}{'us per step':>24}")
        print(f"{'':32}{'rows':>6}" + f"{'all':>14}{'candidates':>14}{'all':>12}{'candidates':>12}")
    for rows in map(int, options.rows.split(",")):
        logits = zipf_logits(rows, share.vocab_size)
        for name, params in KINDS.items():
            report(name, params, logits, share, options)


def zipf_logits(rows: int, vocab_size: int) -> Tensor:
    """Rows of logits of which the probability of the n-th likeliest token is proportional to n**-1.5, shuffled."""
    generator = torch.Generator().manual_seed(0)
    in_order = -1.5 * torch.arange(1, vocab_size + 1).float().log()
    return torch.stack([in_order[torch.randperm(vocab_size, generator=generator)] for _ in range(rows)])


def report(name: str, params: SamplingParams, logits: Tensor, share: Share, options: argparse.Namespace) -> None:
    batch = SamplingBatch([SequenceSampling(params, [0], answer_index=row) for row in range(len(logits))])
    own = logits[:, share.first : share.first + share.count].contiguous()
    sent: list[int] = []

    def counted(x: Tensor) -> Tensor:
        sent.append(x.numel())
        return gather_bytes(x)

    def gathered() -> Tensor:
        (of_ranks,) = share.exchange(own)
        return sample(of_ranks.flatten(1), batch).token_ids

    found = sample_shared(own, batch, replace(share, gather=counted)).token_ids
    assert torch.equal(found, gathered()), "the tokens must be those of all logits"
    whole, now = medians(options.rounds, gathered, lambda: sample_shared(own, batch, share))
    if options.rank == 0:
        rows = len(logits)
        print(f"{name:32}{rows:>6}{4 * share.count:>14,}{sum(sent) // rows:>14,}{whole:>12.0f}{now:>12.0f}", flush=True)


def medians(rounds: int, *bodies: Callable[[], object]) -> list[float]:
    """The median microseconds of each, in rounds that alternate."""
    times: list[list[float]] = [[] for _ in bodies]
    for _ in range(rounds):
        for body, found in zip(bodies, times, strict=True):
            start = time.perf_counter()
            body()
            found.append(time.perf_counter() - start)
    return [1e6 * statistics.median(found[rounds // 10 :]) for found in times]


if __name__ == "__main__":
    main()
