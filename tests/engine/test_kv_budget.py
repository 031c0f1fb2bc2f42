"""The size of the KV cache and its stated reason, for each rule that decides it."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import pytest

from sageLLM import LLM, PDSchedulerConfig
from sageLLM.codegen.driver import PACKAGE
from sageLLM.runtime.engine import kv_budget
from sageLLM.runtime.engine import start_llm as start_module
from sageLLM.runtime.engine.gpu_memory import DeviceMemory, kv_cache_bytes, step_bytes, unloaded_bytes
from sageLLM.runtime.engine.kv_budget import KVCacheSize, choose_kv_cache_size
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.executor.planner import TorchPlanner

MODEL = Path(PACKAGE, "examples", "tiny_python_model")
STRICT, HYBRID = PDSchedulerConfig(mode="strict"), PDSchedulerConfig(mode="hybrid")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(MODEL, dtype="float32", max_model_len=128, skip_tokenizer=True)


def size(llm: LLM, config: PDSchedulerConfig, num_blocks: int | None = None) -> KVCacheSize:
    num_pools = 2 if config.mode == "strict" else 1
    return choose_kv_cache_size(llm.model, config, 16, num_blocks, num_pools)


def test_a_full_batch_of_the_longest_sequences(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_budget, "KV_CACHE_BYTES", 2**50)
    found = size(llm, HYBRID)
    assert found.num_blocks == 128 // 16 * HYBRID.max_decode_batch_size
    assert found.reason == "room for max_decode_batch_size=256 sequences of max_model_len=128 tokens"


@pytest.mark.parametrize(("config", "num_blocks", "num_pools"), [(HYBRID, 100, 1), (STRICT, 50, 2)])
def test_the_default_is_a_total_over_the_pools(
    config: PDSchedulerConfig, num_blocks: int, num_pools: int, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = 100 * kv_budget.bytes_per_block(llm.model, 16)
    monkeypatch.setattr(kv_budget, "KV_CACHE_BYTES", total)
    found = size(llm, config)
    assert (found.num_blocks, found.num_pools, found.num_bytes) == (num_blocks, num_pools, total)
    assert found.reason.startswith("the default size of ")
    assert not found.exceeds_default


def test_the_longest_sequence_always_fits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_budget, "KV_CACHE_BYTES", 10 * kv_budget.bytes_per_block(llm.model, 16))
    found = size(llm, STRICT)
    assert (found.num_blocks, found.num_pools, found.exceeds_default) == (8, 2, True)
    assert found.reason.startswith("room for one sequence of max_model_len=128 tokens, which takes more than ")


def test_the_users_number_is_per_pool(llm: LLM) -> None:
    found = size(llm, STRICT, 20)
    assert (found.num_blocks, found.num_pools, found.reason) == (20, 2, "set by num_kv_blocks")
    mib = found.num_bytes / 2**20
    assert str(found) == (
        f"KV cache: 20 blocks of 16 tokens (320 tokens) in each of 2 pools, {mib:.1f} MiB; set by num_kv_blocks"
    )


def test_the_size_is_logged_and_a_warning_if_it_exceeds_the_default(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sagellm"):
        llm = LLM(MODEL, dtype="float32", max_model_len=128, skip_tokenizer=True)
        monkeypatch.setattr(kv_budget, "KV_CACHE_BYTES", 1)
        larger = LLM(MODEL, dtype="float32", max_model_len=128, skip_tokenizer=True)
    sizes = [(record.levelname, record.message) for record in caplog.records if record.message.startswith("KV cache")]
    assert sizes == [("INFO", str(llm.kv_cache_size)), ("WARNING", str(larger.kv_cache_size))]


def test_a_gpu_has_a_fraction_of_its_memory_less_what_is_used(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory is that after the weights; the rest, with a step's memory, counts towards the fraction."""
    memory, block = DeviceMemory(total=1000 * 2**20, free=700 * 2**20), kv_budget.bytes_per_block(llm.model, 16)
    assert kv_cache_bytes(memory, 0.9, reserved=100 * 2**20) == 500 * 2**20
    with pytest.raises(SageError, match="raise it, or lower max_num_batched_tokens or max_num_seqs"):
        kv_cache_bytes(memory, 0.3, reserved=0)
    monkeypatch.setattr(start_module, "device_memory", lambda device: memory)
    reserved = step_bytes(llm.model, llm.compiler, HYBRID, 16)
    assert HYBRID.max_prefill_tokens * llm.model.config.H * 4 < reserved < 100 * 2**20
    found = LLM(MODEL, dtype="float32", max_model_len=128, skip_tokenizer=True, gpu_memory_utilization=0.5)
    limit = kv_cache_bytes(memory, 0.5, reserved)
    assert found.kv_cache_size.num_blocks == min(limit // block, 128 // 16 * HYBRID.max_decode_batch_size)
    explicit = LLM(MODEL, dtype="float32", num_kv_blocks=20, skip_tokenizer=True, gpu_memory_utilization=0.01)
    assert explicit.kv_cache_size.reason == "set by num_kv_blocks"
    with pytest.raises(SageError, match=r"must be above 0 and at most 1, got 1\.5"):
        LLM(MODEL, gpu_memory_utilization=1.5)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")
def test_a_gpu_has_memory_for_the_results_of_parts_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode attention divides 512 keys into two parts; a captured graph keeps the results of its own."""
    llm = LLM(MODEL, dtype="float32", skip_tokenizer=True)
    reserved: list[int] = []
    for planner in (TorchPlanner({}), TorchPlanner({}, "triton"), TorchPlanner({}, captures=True)):
        monkeypatch.setattr(llm.compiler, "planner", planner)
        reserved.append(step_bytes(llm.model, llm.compiler, HYBRID, 16))
    monkeypatch.setattr(llm.compiler, "planner", TorchPlanner({}, "triton", captures=True))
    captured = step_bytes(llm.model, llm.compiler, HYBRID, 16) - reserved[2]
    part = 6 * (32 + 1) * 4  # of 6 heads: 32 numbers and the logarithm of their weight
    assert reserved[1] - reserved[0] == (HYBRID.max_decode_batch_size + HYBRID.max_prefill_batch_size) * 2 * part
    assert captured - (reserved[1] - reserved[0]) == HYBRID.max_decode_batch_size * 2 * part


def test_one_sequence_must_fit_on_a_gpu(llm: LLM) -> None:
    block = kv_budget.bytes_per_block(llm.model, 16)
    found = choose_kv_cache_size(llm.model, HYBRID, 16, None, 1, 20 * block)
    assert (found.num_blocks, found.reason.endswith("of the GPU; gpu_memory_utilization changes it")) == (20, True)
    with pytest.raises(SageError, match="lower max_model_len to at most 112, or raise gpu_memory_utilization"):
        choose_kv_cache_size(llm.model, HYBRID, 16, None, 1, 7 * block)
    assert 0.9 < unloaded_bytes(llm.model) / (4 * llm.model.num_parameters) <= 1
