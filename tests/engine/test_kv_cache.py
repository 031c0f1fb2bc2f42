"""The KV cache through the public `LLM`: shared prefixes, forks and tiers change the work, not the answers."""

from pathlib import Path

import pytest
import torch

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.codegen.driver import PACKAGE
from sageLLM.runtime.core.model.layout import KvShape
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.kv.copies import BlockCopy, TierCopy
from sageLLM.runtime.worker.block_copies import TieredPool
from sageLLM.runtime.worker.kv_pool import KVPool

MODEL = Path(PACKAGE, "examples", "tiny_python_model")
MODES = ["time_share", "hybrid", "strict"]
SHARED = "import os\nimport sys\nimport json\nfrom pathlib import Path\n\n\nclass Point:\n    "
PROMPTS = [SHARED + end for end in ("def __init__(self", "def move(self, ", "x = ", "def __repr__(")]
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
MIB = 2**-10


def load(mode: str = "hybrid", **options: object) -> LLM:
    return LLM(MODEL, dtype="float32", scheduler=PDSchedulerConfig(mode=mode), block_size=4, **options)


def answers(llm: LLM, params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    outputs = llm.generate(PROMPTS, params)
    llm.engine.scheduler.check_integrity()
    return [answer.token_ids for output in outputs for answer in output.outputs]


@pytest.fixture(scope="module")
def plain() -> list[tuple[int, ...]]:
    """The answers without prefix caching, forks or tiers."""
    llm = load(enable_prefix_caching=False)
    found = answers(llm)
    assert all(stats.total_hit_tokens == 0 for stats in llm.engine.kv_stats().values())
    return found


# --- the prefix cache ---


@pytest.mark.parametrize("mode", MODES)
def test_cached_prefixes_do_not_change_the_answers(mode: str, plain: list[tuple[int, ...]]) -> None:
    llm = load(mode)
    assert answers(llm) == plain
    computed = llm.engine.scheduler.get_stats()["total_prefill_tokens"]
    assert answers(llm) == plain
    again = llm.engine.scheduler.get_stats()["total_prefill_tokens"] - computed
    assert again <= 4 * len(PROMPTS), "the second time only the last tokens of each prompt are computed"


def test_an_output_reports_its_cached_tokens() -> None:
    llm = load()
    first, second = (llm.generate(PROMPTS[0], GREEDY)[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == (len(first.prompt_token_ids) - 1) // 4 * 4


def test_prompt_logprobs_are_complete_although_the_prompt_is_cached() -> None:
    llm = load()
    params = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=0)
    llm.generate(PROMPTS, GREEDY)
    cold = load().generate(PROMPTS[0], params)[0]
    warm = llm.generate(PROMPTS[0], params)[0]
    assert warm.num_cached_tokens == 0
    assert warm.prompt_logprobs is not None and cold.prompt_logprobs is not None
    assert len(warm.prompt_logprobs) == len(warm.prompt_token_ids) == len(cold.prompt_logprobs)


def test_the_second_turn_of_a_conversation_finds_prompt_and_answer() -> None:
    llm = load()
    first = llm.generate(PROMPTS[0], GREEDY)[0]
    history = [*first.prompt_token_ids, *first.outputs[0].token_ids]
    second = llm.generate([*history, 5, 6, 7], GREEDY)[0]
    assert second.num_cached_tokens >= len(history) - 4
    assert second.outputs == load().generate([*history, 5, 6, 7], GREEDY)[0].outputs


# --- forks ---


@pytest.mark.parametrize("mode", MODES)
def test_n_answers_equal_those_of_n_separate_requests(mode: str) -> None:
    llm = load(mode, enable_prefix_caching=False)
    params = SamplingParams(n=3, max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    together = llm.generate(PROMPTS, params)
    llm.engine.scheduler.check_integrity()
    expected = load("time_share").generate(PROMPTS, params)
    assert [o.outputs for o in together] == [o.outputs for o in expected]
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in together)
    computed = llm.engine.scheduler.get_stats()["total_prefill_tokens"]
    if mode == "strict":
        assert computed == 3 * num_prompt_tokens
    else:
        assert computed == num_prompt_tokens, "each prompt is computed once"
        assert llm.engine.kv_stats()["worker"].total_forks == 2 * len(PROMPTS)


@pytest.mark.parametrize("num_kv_blocks", [24, 40])
def test_forks_in_a_small_pool_have_the_same_answers(num_kv_blocks: int) -> None:
    params = SamplingParams(n=4, max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    tight = load(num_kv_blocks=num_kv_blocks, swap_space=1 * MIB)
    found = tight.generate(PROMPTS, params)
    assert tight.engine.scheduler.get_stats()["total_preemptions"] > 0, "the pool was meant to be too small"
    assert [o.outputs for o in found] == [o.outputs for o in load().generate(PROMPTS, params)]


def test_forks_that_end_with_their_first_token_end() -> None:
    llm = load()
    params = SamplingParams(n=3, max_tokens=1, temperature=1.0, seed=1)
    output = llm.generate(PROMPTS[0], params)[0]
    assert [len(answer.token_ids) for answer in output.outputs] == [1, 1, 1]
    assert llm.engine.kv_stats()["worker"].num_used == 0


def test_aborting_a_request_aborts_its_forks() -> None:
    llm = load()
    for num_steps in (0, 1, 3):
        llm.engine.add("a", None, list(range(3, 40)), SamplingParams(n=3, max_tokens=12))
        for _ in range(num_steps):
            llm.engine.step()
        llm.engine.abort("a")
        assert not llm.engine.has_work
        assert llm.engine.kv_stats()["worker"].num_used == 0
        llm.engine.scheduler.check_integrity()


# --- tiers ---


@pytest.mark.parametrize("tier", ["swap_space", "disk_space"])
@pytest.mark.parametrize("mode", MODES)
def test_swapped_requests_have_the_same_answers(
    mode: str, tier: str, plain: list[tuple[int, ...]], tmp_path: Path
) -> None:
    llm = load(mode, num_kv_blocks=24, disk_folder=tmp_path, **{tier: 1 * MIB})
    assert answers(llm) == plain
    stats = llm.engine.kv_stats()["decode" if mode == "strict" else "worker"]
    assert stats.total_swaps_out > 0, "the pool was meant to be too small"
    assert stats.total_swaps_in == stats.total_swaps_out
    assert stats.num_host_used == stats.num_disk_used == 0
    assert llm.engine.scheduler.get_stats()["total_recomputed_tokens"] == 0
    assert list(tmp_path.iterdir()) == [], "the files are unlinked"


def test_a_tier_that_is_too_small_falls_back_to_recompute(plain: list[tuple[int, ...]]) -> None:
    probe = load(swap_space=1 * MIB)
    block_gib = 1 * MIB / probe.engine.scheduler.kv.decode._swap.pools["host"].num_blocks
    llm = load(num_kv_blocks=24, swap_space=3 * block_gib, enable_prefix_caching=False)
    assert answers(llm) == plain
    assert llm.engine.scheduler.get_stats()["total_recomputed_tokens"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swap_space": -1}, "swap_space must be a number of GiB, at least 0, got -1"),
        ({"disk_space": "2"}, "disk_space must be a number of GiB, at least 0, got '2'"),
        (
            {"swap_space": 1e-9},
            "swap_space must hold at least one KV block of 8192 bytes, got 1e-09 GiB; raise it, or pass 0",
        ),
    ],
)
def test_sizes_of_tiers_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(SageError) as caught:
        load(**options)
    assert str(caught.value) == message


def test_swapping_requires_a_tier() -> None:
    with pytest.raises(SageError, match="requires a tier to swap to; set swap_space or disk_space"):
        LLM(MODEL, scheduler=PDSchedulerConfig(preemption_mode="swap"))


# --- copies ---


@pytest.mark.parametrize("is_shared", [False, True])
def test_blocks_survive_a_trip_through_every_tier(is_shared: bool, tmp_path: Path) -> None:
    llm = load()
    shape = llm.model.layout.cache(llm.model.config)
    if is_shared:
        shape = KvShape(shape.k, shape.k, is_shared=True)
    layers = llm.model.config.L
    pool = KVPool(layers, 6, 4, shape, torch.float32, torch.device("cpu"))
    for _, keys, values in pool.layers():
        keys.normal_()
        values.normal_()
    before = [keys.clone() for keys in pool.keys], [values.clone() for values in pool.values]
    tiers = TieredPool(pool, {"host": 3, "disk": 2}, llm.compiler, tmp_path)
    tiers.copy_tiers([TierCopy("a", "device", "host", [1, 3], [2, 0], 8), TierCopy("b", "device", "disk", [4], [1], 4)])
    for tensor in (*pool.keys, *pool.values):
        tensor.zero_()
    tiers.copy_tiers([TierCopy("b", "disk", "device", [1], [5], 4), TierCopy("a", "host", "device", [2, 0], [0, 2], 8)])
    tiers.copy_blocks([BlockCopy(0, 1), BlockCopy(5, 3)])
    for tensors, kept in ((pool.keys, before[0]), (pool.values, before[1])):
        for tensor, old in zip(tensors, kept, strict=True):
            assert torch.equal(tensor[[0, 1, 2, 3, 5]], old[[1, 1, 3, 4, 4]])
            assert not tensor[4].any()


def test_copies_to_a_tier_run_in_the_background_and_report_failures() -> None:
    llm = load()
    pool = KVPool(
        llm.model.config.L, 3, 4, llm.model.layout.cache(llm.model.config), torch.float32, torch.device("cpu")
    )
    tiers = TieredPool(pool, {"host": 2}, llm.compiler)
    pool.keys[0].fill_(3)
    tiers.start([TierCopy("a", "device", "host", [1], [0], 4)])
    tiers.wait()
    tiers.wait()
    assert torch.equal(tiers.pools["host"].keys[0][0], pool.keys[0][1])
    tiers.start([TierCopy("a", "device", "host", [1], [7], 4)])
    with pytest.raises(IndexError):
        tiers.wait()


def test_a_reset_cache_finds_nothing() -> None:
    llm = load()
    llm.generate(PROMPTS[0], GREEDY)
    llm.engine.reset_prefix_cache()
    assert llm.generate(PROMPTS[0], GREEDY)[0].num_cached_tokens == 0
