"""Running requests with KV in a tier below the device: equal answers, and more requests than the pool holds."""

from pathlib import Path
from typing import Any

import pytest

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.codegen.driver import PACKAGE
from sageLLM.runtime.errors import SageError

MODEL = Path(PACKAGE, "examples", "tiny_python_model")
MODES = ["time_share", "hybrid", "strict"]
SHARED = "import os\nimport sys\nimport json\nfrom pathlib import Path\n\n\nclass Point:\n    "
PROMPTS = [SHARED + end for end in ("def __init__(self", "def move(self, ", "x = ", "def __repr__(")]
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(n=3, max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
MIB = 2**-10
NUM_BLOCKS = 24


def load(mode: str = "hybrid", **options: Any) -> LLM:
    config = PDSchedulerConfig(mode=mode, prefill_chunk_size=16)
    return LLM(MODEL, dtype="float32", scheduler=config, block_size=4, **options)


def answers(llm: LLM, params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    outputs = llm.generate(PROMPTS, params)
    llm.engine.scheduler.check_integrity()
    return [answer.token_ids for output in outputs for answer in output.outputs]


@pytest.fixture(scope="module")
def plain() -> list[tuple[int, ...]]:
    return answers(load())


def num_kept(llm: LLM) -> int:
    """The most requests that run at once, over a run of all prompts."""
    for i, prompt in enumerate(PROMPTS):
        llm.engine.add(str(i), None, llm.tokenizer.encode(prompt), GREEDY)
    most = 0
    while llm.engine.has_work:
        llm.engine.step()
        most = max(most, llm.engine.scheduler.get_num_running())
    return most


def num_loading_steps(llm: LLM) -> int:
    """The steps so far that have loaded blocks from the tier below."""
    return sum(report.num_steps for report in llm.io_stats())


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("mode", MODES)
def test_the_answers_are_equal(mode: str, tier: str, plain: list[tuple[int, ...]], tmp_path: Path) -> None:
    llm = load(mode, num_kv_blocks=NUM_BLOCKS, kv_tier=tier, kv_tier_space=1 * MIB, disk_folder=tmp_path)
    assert answers(llm) == plain
    assert llm.engine.scheduler.get_stats()["total_preemptions"] == 0
    assert llm.engine.executor.decoder.runner._lower_plans, "the pool was meant to be too small"
    assert llm.engine.kv_stats()["decode" if mode == "strict" else "worker"].num_lower_used == 0
    assert list(tmp_path.iterdir()) == [], "the file is unlinked"


def test_more_requests_run_than_the_pool_holds() -> None:
    alone = num_kept(load(num_kv_blocks=NUM_BLOCKS, enable_prefix_caching=False))
    together = num_kept(load(num_kv_blocks=NUM_BLOCKS, enable_prefix_caching=False, kv_tier="host"))
    assert alone < together == len(PROMPTS)


def test_a_sequence_longer_than_the_pool_runs() -> None:
    prompt = [5 + i % 90 for i in range(150)]
    expected = load().generate(prompt, GREEDY)[0].outputs[0].token_ids
    llm = load(num_kv_blocks=8, kv_tier="host", kv_tier_space=1 * MIB)
    assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == expected


@pytest.mark.parametrize(
    ("mode", "caches", "tier"), [("hybrid", False, "host"), ("time_share", True, "disk"), ("strict", True, "host")]
)
def test_blocks_move_up_when_the_device_has_room(mode: str, caches: bool, tier: str, tmp_path: Path) -> None:
    """The first requests fill the device and end early; the last ones begin in the tier below."""
    params = [SamplingParams(max_tokens=n, temperature=1.0, seed=n, ignore_eos=True) for n in (3, 5, 12, 26)]
    expected = [output.outputs[0].token_ids for output in load(mode).generate(PROMPTS, params)]
    options = {"kv_tier": tier, "kv_tier_space": 1 * MIB, "disk_folder": tmp_path, "enable_prefix_caching": caches}
    llm = load(mode, num_kv_blocks=20, **options)
    for i, prompt in enumerate(PROMPTS):
        llm.engine.add(str(i), None, llm.tokenizer.encode(prompt), params[i])
    found: dict[str, tuple[int, ...]] = {}
    lower, loads = [], []
    while llm.engine.has_work:
        for output in llm.engine.step():
            found[output.request_id] = output.outputs[0].token_ids
        llm.engine.scheduler.check_integrity()
        lower.append(llm.engine.kv_stats()["decode" if mode == "strict" else "worker"].num_lower_used)
        loads.append(num_loading_steps(llm))
    assert [found[str(i)] for i in range(len(PROMPTS))] == expected
    stats = llm.engine.kv_stats()["decode" if mode == "strict" else "worker"]
    assert stats.total_promoted > 0
    assert lower[-4] == 0 < max(lower), "the last steps were meant to run on the device"
    assert 0 < loads[-4] == loads[-1]
    if caches:  # the blocks that have moved are found again
        again = llm.generate(PROMPTS, params)
        assert [output.outputs[0].token_ids for output in again] == expected


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_forks_are_equal(kernels: str) -> None:
    options = {"kernels": kernels, "enable_prefix_caching": False}
    llm = load(num_kv_blocks=16, kv_tier="host", kv_tier_space=1 * MIB, **options)
    assert answers(llm, DRAWN) == answers(load(**options), DRAWN)
    assert llm.engine.kv_stats()["worker"].total_forks == 2 * len(PROMPTS)


def test_cached_prefixes_are_found_in_both_tiers(plain: list[tuple[int, ...]]) -> None:
    llm = load(num_kv_blocks=NUM_BLOCKS, kv_tier="host", kv_tier_space=1 * MIB)
    assert answers(llm) == plain
    again = llm.generate(PROMPTS, GREEDY)
    assert [output.outputs[0].token_ids for output in again] == plain
    assert all(output.num_cached_tokens >= len(output.prompt_token_ids) - 8 for output in again)


@pytest.mark.parametrize("swap_space", [0.0, 1 * MIB])
def test_preemption_when_both_tiers_are_full(swap_space: float, plain: list[tuple[int, ...]]) -> None:
    llm = load(num_kv_blocks=12, kv_tier="host", kv_tier_space=0.1 * MIB, swap_space=swap_space)
    assert answers(llm) == plain
    assert llm.engine.scheduler.get_stats()["total_preemptions"] > 0, "the tiers were meant to be too small"


def test_weights_and_kv_below_the_device(plain: list[tuple[int, ...]], tmp_path: Path) -> None:
    options = {"kv_tier": "disk", "kv_tier_space": 1 * MIB, "weights_tier": "disk", "weights_folder": tmp_path}
    assert answers(load(num_kv_blocks=NUM_BLOCKS, **options)) == plain


def test_pipeline_stages_have_tiers(plain: list[tuple[int, ...]], tmp_path: Path) -> None:
    options = {"kv_tier_space": 1 * MIB, "weights_tier": "disk", "weights_folder": tmp_path}
    llm = load(num_kv_blocks=NUM_BLOCKS, kv_tier="host", pipeline_parallel_size=2, **options)
    try:
        assert answers(llm) == plain
        reports = llm.io_stats()
        assert {report.graph.rpartition(" ")[2] for report in reports} == {"0", "1"}, "both ranks report"
        assert all(0 < report.total.io_s >= report.total.hidden_s for report in reports)
    finally:
        llm.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_tier": "ssd"}, "kv_tier must be 'device', 'host' or 'disk', got 'ssd'"),
        ({"kv_tier": "host", "kv_tier_space": 0}, "kv_tier_space must be more than 0 GiB with kv_tier='host'"),
        ({"kv_tier": "host", "kv_tier_space": 1e-9}, "kv_tier_space must hold at least one KV block"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SageError) as caught:
        load(**options)
    assert message in str(caught.value)
