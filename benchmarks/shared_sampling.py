"""Measures sampling from a vocabulary that ranks share: with candidates, and with all logits gathered.

    python benchmarks/shared_sampling.py [--ranks 2] [--rounds 200] [--vocab 49152] [--rows 1,16]

Prints for each kind of parameters the bytes that a rank sends per row, and the median microseconds of processor time
that a rank computes in a step, without the exchange. The ranks are threads; the step of the first one is then repeated
with the recorded parts of the others. The logits fall with the logarithm of their place (Zipf's law), in random order.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

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
Body = Callable[[Tensor, SamplingBatch, Share], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rows", default="1,16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':38}{'bytes per row':>28}{'us per step':>24}")
    print(f"{'':32}{'rows':>6}" + f"{'all':>14}{'candidates':>14}{'all':>12}{'candidates':>12}")
    for rows in map(int, options.rows.split(",")):
        logits = zipf_logits(rows, options.vocab)
        for name, params in KINDS.items():
            batch = SamplingBatch([SequenceSampling(params, [0], answer_index=row) for row in range(rows)])
            whole = measure(logits, options, batch, gather_all)
            shared = measure(logits, options, batch, exchange_parts)
            assert torch.equal(whole[0], shared[0]), "the tokens must be those of all logits"
            print(f"{name:32}{rows:>6}{whole[1]:>14,}{shared[1]:>14,}{whole[2]:>12.0f}{shared[2]:>12.0f}", flush=True)


def zipf_logits(rows: int, vocab_size: int) -> Tensor:
    """Rows of logits of which the probability of the n-th likeliest token is proportional to n**-1.5, shuffled."""
    generator = torch.Generator().manual_seed(0)
    in_order = -1.5 * torch.arange(1, vocab_size + 1).float().log()
    return torch.stack([in_order[torch.randperm(vocab_size, generator=generator)] for _ in range(rows)])


def gather_all(own: Tensor, batch: SamplingBatch, share: Share) -> Tensor:
    (of_ranks,) = share.exchange(own)
    return sample(of_ranks.flatten(1), batch).token_ids


def exchange_parts(own: Tensor, batch: SamplingBatch, share: Share) -> Tensor:
    return sample_shared(own, batch, share).token_ids


def measure(logits: Tensor, options: argparse.Namespace, batch: SamplingBatch, body: Body) -> tuple[Tensor, int, float]:
    """The tokens, the bytes per row that a rank sends, and the microseconds of the first rank's computation."""
    num_ranks, width = options.ranks, logits.shape[1] // options.ranks
    barrier, parts, recorded = threading.Barrier(num_ranks), [torch.empty(0)] * num_ranks, list[Tensor]()

    def run(rank: int) -> Tensor:
        def gather(x: Tensor) -> Tensor:
            parts[rank] = x
            barrier.wait()
            found = torch.stack(parts)
            if rank == 0:
                recorded.append(found)
            barrier.wait()
            return found

        return body(share_of(rank), batch, replace(share, first=rank * width, gather=gather))

    def share_of(rank: int) -> Tensor:
        return logits[:, rank * width : (rank + 1) * width].contiguous()

    share = Share(0, width, width * num_ranks, num_ranks)
    with ThreadPoolExecutor(num_ranks) as threads:
        tokens, *_ = list(threads.map(run, range(num_ranks)))
    own, times = share_of(0), []
    for _ in range(options.rounds):
        answers: Iterator[Tensor] = iter(recorded)
        start = time.thread_time()
        body(own, batch, replace(share, gather=lambda _, answers=answers: next(answers)))
        times.append(time.thread_time() - start)
    sent = sum(found[0].numel() for found in recorded) // len(logits)
    return tokens, sent, 1e6 * statistics.median(times)


if __name__ == "__main__":
    main()
