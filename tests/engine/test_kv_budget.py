"""The size of the KV cache and its stated reason, for each rule that decides it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sageLLM import LLM, PDSchedulerConfig
from sageLLM.codegen.driver import PACKAGE
from sageLLM.runtime.engine import kv_budget
from sageLLM.runtime.engine.kv_budget import KVCacheSize, choose_kv_cache_size

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
