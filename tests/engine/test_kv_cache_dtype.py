"""The KV cache in codes of 8 bits: equal answers of kernels, modes, tiers and ranks; sizes; refused combinations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.codegen.driver import PACKAGE
from sageLLM.runtime.core.model.kv_form import KV_FORMS
from sageLLM.runtime.engine.kv_budget import bytes_per_block
from sageLLM.runtime.errors import SageError

MODEL = Path(PACKAGE, "examples", "tiny_python_model")
SHARED = "import os\nimport sys\nimport json\nfrom pathlib import Path\n\n\nclass Point:\n    "
PROMPTS = [SHARED + end for end in ("def __init__(self", "def move(self, ", "x = ", "def __repr__(")]
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, logprobs=1)
DRAWN = SamplingParams(n=3, max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
MIB = 2**-10
FORMS = list(KV_FORMS)


def load(form: str = "int8", mode: str = "hybrid", **options: Any) -> LLM:
    config = PDSchedulerConfig(mode=mode, prefill_chunk_size=16)
    options = {"dtype": "float32", "block_size": 4, **options}
    return LLM(MODEL, scheduler=config, kv_cache_dtype=form, **options)


def answers(llm: LLM, params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    outputs = llm.generate(PROMPTS, params)
    llm.engine.scheduler.check_integrity()
    return [answer.token_ids for output in outputs for answer in output.outputs]


@pytest.fixture(scope="module")
def plain() -> dict[str, list[tuple[int, ...]]]:
    return {form: answers(load(form)) for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_have_the_tokens_of_the_references(form: str, plain: dict[str, list[tuple[int, ...]]]) -> None:
    llm = load(form, kernels="reference")
    assert answers(llm) == plain[form]
    pool = llm.engine.executor.decoder.runner.pool
    assert pool.keys[0].dtype == {"int8": torch.int8, "fp8": torch.uint8}[form]
    assert bool(pool.keys[0].any())


def test_bf16_kernels_have_the_tokens_of_the_references() -> None:
    assert answers(load(dtype="bfloat16")) == answers(load(dtype="bfloat16", kernels="reference"))


def test_every_op_has_a_native_kernel() -> None:
    llm = load()
    llm.generate(PROMPTS[:1], SamplingParams(max_tokens=2))
    assert all(not stats.in_python for stats in llm.kernel_stats())


@pytest.mark.parametrize("form", FORMS)
def test_log_probabilities_are_near_those_of_the_element_type(form: str) -> None:
    """And they differ, or the codes would not be read."""
    prompts, params = [SHARED], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    both = [load(one).generate(prompts, params)[0] for one in ("auto", form)]
    ids = both[0].prompt_token_ids
    values = [
        torch.tensor([step[token].logprob for token, step in zip(ids[1:], one.prompt_logprobs[1:], strict=True)])
        for one in both
    ]
    distance = (values[0] - values[1]).abs()
    assert 0 < float(distance.mean()) < {"int8": 0.02, "fp8": 0.2}[form]


@pytest.mark.parametrize("mode", ["time_share", "strict"])
@pytest.mark.parametrize("form", FORMS)
def test_modes_and_the_prefix_cache(form: str, mode: str, plain: dict[str, list[tuple[int, ...]]]) -> None:
    llm = load(form, mode)
    assert answers(llm) == plain[form]
    again = llm.generate(PROMPTS, GREEDY)
    assert [output.outputs[0].token_ids for output in again] == plain[form]
    assert all(output.num_cached_tokens >= len(output.prompt_token_ids) - 8 for output in again)
    assert answers(load(form, mode, enable_prefix_caching=False)) == plain[form]


@pytest.mark.parametrize("option", ["swap_space", "disk_space"])
def test_swapped_requests(option: str, plain: dict[str, list[tuple[int, ...]]], tmp_path: Path) -> None:
    llm = load(num_kv_blocks=24, disk_folder=tmp_path, enable_prefix_caching=False, **{option: 1 * MIB})
    assert answers(llm) == plain["int8"]
    stats = llm.engine.kv_stats()["worker"]
    assert stats.total_swaps_in == stats.total_swaps_out > 0, "the pool was meant to be too small"


@pytest.mark.parametrize(("form", "tier", "mode"), [("int8", "host", "hybrid"), ("fp8", "disk", "strict")])
def test_tiers_of_running_requests(
    form: str, tier: str, mode: str, plain: dict[str, list[tuple[int, ...]]], tmp_path: Path
) -> None:
    llm = load(form, mode, num_kv_blocks=24, kv_tier=tier, kv_tier_space=1 * MIB, disk_folder=tmp_path)
    assert answers(llm) == plain[form]
    assert llm.engine.executor.decoder.runner._lower_plans, "the pool was meant to be too small"


def test_forks() -> None:
    llm = load(enable_prefix_caching=False)
    assert answers(llm, DRAWN) == answers(load(kernels="reference", enable_prefix_caching=False), DRAWN)
    assert llm.engine.kv_stats()["worker"].total_forks == 2 * len(PROMPTS)


@pytest.mark.parametrize(
    "options",
    [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"num_ubatches": 2, "tensor_parallel_size": 2}],
    ids=str,
)
def test_ranks(options: dict[str, Any], plain: dict[str, list[tuple[int, ...]]]) -> None:
    llm = load(**options)
    try:
        assert answers(llm) == plain["int8"]
    finally:
        llm.close()


def test_bytes_of_a_block() -> None:
    """A row of 32 elements, the width of a head here, takes 32 bytes and a scale of 4."""
    sizes = {form: bytes_per_block(load(form, dtype="bfloat16").model, 4) for form in ("auto", *FORMS)}
    config = load().model.config
    assert config.D == 32
    assert sizes["int8"] == sizes["fp8"] == config.L * 4 * 2 * config.Nkv * (config.D + 4)
    assert sizes["auto"] == config.L * 4 * 2 * config.Nkv * config.D * 2


def test_a_budget_of_memory_holds_more_blocks() -> None:
    """The default size is in bytes; and tiers have as many blocks as fit."""
    codes, plain = (load(form, dtype="bfloat16", max_model_len=64, swap_space=1 * MIB) for form in ("int8", "auto"))
    swap = [llm.engine.scheduler.kv.decode._swap.pools["host"].num_blocks for llm in (codes, plain)]
    assert swap[0] / swap[1] == pytest.approx(64 / 36, rel=0.01)


@pytest.mark.parametrize("form", ["float8", "fp4", "", 8])
def test_unknown_forms(form: Any) -> None:
    with pytest.raises(SageError, match="kv_cache_dtype must be one of auto, int8, fp8, got"):
        load(form)


def test_latent_attention_is_refused(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(
        "DeepseekV2",
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=20,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        num_key_value_heads=4,
    )
    with pytest.raises(SageError, match=r"kv_cache_dtype must be 'auto' for deepseek_v2, got 'int8': its values"):
        LLM(folder, kv_cache_dtype="int8", skip_tokenizer=True)
