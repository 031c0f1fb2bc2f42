"""Kernels between guards: planted mistakes are found, and an engine without mistakes returns the same tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sageLLM import LLM, SamplingParams
from sageLLM.generated.kernels.reference import KERNELS
from sageLLM.generated.ops import OPS
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.executor.red_zones import CheckedKernel, guarded, is_damaged, require_unit_strides

MODEL = Path(__file__).parents[2] / "examples/tiny_python_model"


def embedding(mistake: Callable[[Tensor, Tensor], Any]) -> Callable[..., Tensor]:
    def launch(ids: Tensor, table: Tensor) -> Tensor:
        y = torch.empty(len(ids), table.shape[1])
        y.copy_(table[ids.long()])
        mistake(y, ids)
        return y

    return launch


def store_after(y: Tensor, ids: Tensor) -> None:
    torch.as_strided(y, (1,), (1,), y.storage_offset() + y.numel())[0] = 5.0


def store_before(y: Tensor, ids: Tensor) -> None:
    torch.as_strided(y, (1,), (1,), y.storage_offset() - 1)[0] = 5.0


MISTAKES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "embedding must store within its memory, got a store next to torch.float32": store_after,
    "embedding must store within its memory": store_before,
    "embedding must not change its operand 'ids': a store out of bounds": lambda y, ids: ids.add_(1),
    "embedding must return the same bits for the same operands: its programs race": lambda y, ids: y[0].uniform_(),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_of_a_kernel_are_found(message: str) -> None:
    kernel = CheckedKernel(OPS["embedding"], embedding(MISTAKES[message]))
    with pytest.raises(SageError, match=message):
        kernel(torch.tensor([1, 2], dtype=torch.int32), torch.randn(9, 7))


def test_results_without_mistakes_are_those_of_the_kernel() -> None:
    operands = torch.tensor([1, 2], dtype=torch.int32), torch.randn(9, 7)
    kernel = CheckedKernel(OPS["embedding"], embedding(lambda y, ids: None))
    assert torch.equal(kernel(*operands), KERNELS["embedding"](*operands))
    unwritten = CheckedKernel(OPS["embedding"], lambda ids, table: torch.empty(2, 7))(*operands)
    assert unwritten.isnan().all(), "memory that a kernel does not write is NaN"


def test_a_store_next_to_a_cache_is_found() -> None:
    keys = guarded((4, 2, 3, 5), torch.bfloat16, torch.device("cpu"), fill=0)
    assert keys.abs().sum() == 0 and not is_damaged(keys)
    torch.as_strided(keys, (1,), (1,), keys.storage_offset() + keys.numel())[0] = 1.0
    assert is_damaged(keys)


def test_an_engine_between_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, params = [[5, 7, 11], [6] * 20], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)

    def tokens() -> list[list[int]]:
        llm = LLM(MODEL, dtype="float32", skip_tokenizer=True, num_kv_blocks=8)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    expected = tokens()
    monkeypatch.setenv("SAGELLM_RED_ZONES", "1")
    assert tokens() == expected


def test_launchers_require_a_contiguous_last_dim() -> None:
    def rms_norm(x: Tensor) -> Tensor:
        return x

    assert require_unit_strides(rms_norm) is rms_norm
    rms_norm.__module__ = "sageLLM.generated.kernels.triton.norm"
    checked = require_unit_strides(rms_norm)
    checked(torch.zeros(3, 4)[:, :2])
    checked(torch.zeros(4, 1).T)
    with pytest.raises(SageError, match=r"last dim of operand 0 must be contiguous, got strides \(1, 4\)"):
        checked(torch.zeros(3, 4).T)
