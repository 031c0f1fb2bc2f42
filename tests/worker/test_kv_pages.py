"""Pages of a KV pool are allocated before they are written to."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.core.model.layout import KvShape
from sageLLM.runtime.worker import kv_pages
from sageLLM.runtime.worker.kv_pages import KVPages, populate
from sageLLM.runtime.worker.kv_pool import KVPool

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"
PAGE = 4096


def make_pool(num_blocks: int) -> KVPool:
    """Two layers with blocks of 16 pages."""
    shape = KvShape(k=(4, 256), v=(4, 256))
    return KVPool(2, num_blocks, 16, shape, torch.float32, torch.device("cpu"))


def share_resident(tensor: torch.Tensor) -> float:
    """The share of the pages within the tensor that have memory, as mincore(2) reports."""
    start = -(-tensor.data_ptr() // PAGE) * PAGE
    num_pages = (tensor.data_ptr() + tensor.nbytes - start) // PAGE
    flags = (ctypes.c_ubyte * num_pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(num_pages * PAGE), flags) == 0
    return sum(flag & 1 for flag in flags) / num_pages


def populates() -> bool:
    return sys.platform == "linux" and populate(torch.zeros(8 * PAGE, dtype=torch.uint8))


@pytest.mark.skipif(not populates(), reason="the system cannot allocate pages in advance")
def test_blocks_that_follow_those_in_use_have_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []  # of the memory that is allocated; pages beyond may have memory of earlier tests

    def recorded(tensor: torch.Tensor) -> bool:
        ends.append(tensor.data_ptr() + tensor.nbytes)
        return populate(tensor)

    monkeypatch.setattr(kv_pages, "populate", recorded)
    pages = KVPages(pool := make_pool(num_blocks=160))
    pages.expect(num_used=3, num_sequences=1)
    pages.expect(num_used=4, num_sequences=40)
    pages.close()
    for tensor in (*pool.keys, *pool.values):
        assert share_resident(tensor[4:84]) == 1.0  # those below are written by the step that runs
        assert not any(tensor[130].data_ptr() < end <= tensor.data_ptr() + tensor.nbytes for end in ends)
    assert ends


def test_the_pages_of_a_pool_are_kept_ahead_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(MODEL, skip_tokenizer=True, num_kv_blocks=64, block_size=4, max_model_len=128)
    calls: list[tuple[int, int]] = []
    pages = llm.engine.executor.decoder._pages
    monkeypatch.setattr(pages, "expect", lambda *args: calls.append(args))
    llm.generate([[5, 6, 7], [8, 9]], SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))
    assert calls[-1][0] == 8, "two sequences of up to 15 tokens have 4 blocks each"
    assert {num_sequences for _, num_sequences in calls} == {0, 2}
