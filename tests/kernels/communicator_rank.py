"""One rank of `test_cpu_communicator.py`: runs collectives on drawn tensors, and compares with those of all ranks.

python communicator_rank.py MEMORY RANK NUM_RANKS
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from sageLLM.generated.kernels import cpu, reference
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.communicator import gather_bytes, open_communicator
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.library import Library

SHAPES = [(1, 1), (1, 7), (3, 640), (129, 33), (5, 2, 16), (2, 300_001), (0, 8)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def main() -> None:
    memory, rank, num_ranks = (int(text) for text in sys.argv[1:])
    compiler = find_compiler()
    assert compiler is not None, "the test is skipped without a compiler"
    open_communicator(memory, rank, num_ranks, compiler)
    library = Library(cpu.KERNELS, Path(cpu.__file__).parent, compiler)
    names = ("all_reduce", "all_gather", "allreduce_add_rms_norm", "fused_add_rms_norm", "sample_shard")
    kernels = {name: NativeCallable(cpu.KERNELS[name], library, reference.KERNELS[name]) for name in names}
    check_sampling(kernels["sample_shard"], rank, num_ranks)
    for size in (0, 1, 63, 2**20, 2**21 + 5):
        bytes_of_ranks = [torch.arange(size).add(7 * one).to(torch.uint8) for one in range(num_ranks)]
        check(gather_bytes(bytes_of_ranks[rank]), torch.stack(bytes_of_ranks))
    for number in range(3):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for shape in SHAPES:
                parts = [drawn(shape, dtype, 100 * number + one) for one in range(num_ranks)]
                own = parts[rank].clone()
                total = sum_in_order(parts)
                check(kernels["all_reduce"](own, group="tp"), total.to(dtype))
                check(kernels["all_gather"](own, W=num_ranks, group="tp"), torch.cat(parts, -1))
                wide = torch.cat([parts[rank], parts[rank]], -1)[..., : shape[-1]]  # rows with gaps
                check(kernels["all_reduce"](wide, group="tp"), total.to(dtype))
                if len(shape) == 2:
                    x, weight = (drawn(size, dtype, 7) for size in (shape, shape[1:]))
                    apart = kernels["fused_add_rms_norm"](x, total.to(dtype), weight, eps=1e-5)
                    for part in (own, wide):
                        found = kernels["allreduce_add_rms_norm"](x, part.clone(), weight, eps=1e-5, group="tp")
                        for one, other in zip(found, apart, strict=True):
                            check(one, other)


def check_sampling(sample: NativeCallable, rank: int, num_ranks: int) -> None:
    """Logits with ties within ranks and between them, rows of NaN and -inf, and a vocabulary that ends with padding."""
    rows, vocab_size = 300, 32 * num_ranks - 9
    logits = drawn((rows, 32 * num_ranks), torch.float32, 5).mul(2).round()
    logits[3, 40], logits[4, [7, 33]], logits[5] = torch.nan, torch.nan, -torch.inf
    logits[:, vocab_size:] = 100.0
    share = slice(32 * rank, 32 * (rank + 1))
    count = min(share.stop, vocab_size) - share.start
    tokens, best = sample(logits[:, share], first=share.start, count=count, group="tp")
    wanted = logits[:, :vocab_size].max(-1)
    assert torch.equal(tokens, logits[:, :vocab_size].argmax(-1))
    assert torch.equal(best.nan_to_num(7.0), wanted.values.nan_to_num(7.0))


def sum_in_order(parts: list[Tensor]) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


def check(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found, expected), f"{tuple(expected.shape)} {expected.dtype}"


if __name__ == "__main__":
    main()
