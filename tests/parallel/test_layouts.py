"""Ranks against one process, for one layout of each kind, in one mode; layouts.py compares all in all modes.

Collectives also run next to computation, of the same block and of another micro-batch.
"""

import pytest

from .layouts import cases, compare

CHOSEN = {
    "mixtral": ("time_share", ["2x1"]),
    "deepseek_v2": ("strict", ["2x1"]),
    "gemma3": ("hybrid", ["1x2"]),
    "granite": ("hybrid", ["2x1"]),  # with a factor on the logits
    "gemma2": ("time_share", ["2x1"]),  # with caps of scores and logits
    "falcon 7b: one key head": ("hybrid", ["2x1"]),  # of which each rank has a copy
    "gpt2": ("strict", ["1x2"]),  # with learned positions and a tied head
    "qwen3_moe, every second layer sparse, window": ("strict", ["1x2"]),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_two_ranks_equal_one(name: str) -> None:
    family, config = next((family, config) for found, family, config in cases(name) if found == name)
    mode, degrees = CHOSEN[name]
    assert compare(family, config, mode, degrees) == ["equal"] * len(degrees)


def test_two_ranks_with_overlapping_collectives_equal_one() -> None:
    family, config = next((family, config) for found, family, config in cases("phi") if found == "phi")
    assert compare(family, config, "hybrid", ["2x1"], num_ubatches=2, overlap_transfers=True) == ["equal"]


def test_two_stages_in_micro_batches_equal_one() -> None:
    family, config = next((family, config) for found, family, config in cases("deepseek_v2") if found == "deepseek_v2")
    assert compare(family, config, "hybrid", ["1x2"], num_ubatches=2) == ["equal"]


def test_two_ranks_with_whole_experts_equal_one() -> None:
    _, family, config = next(cases("mixtral, window"))
    assert compare(family, config, "hybrid", ["2x1"], enable_expert_parallel=True) == ["equal"]
