"""Ranks against one process, for layouts with experts, latent attention, ALiBi and windows; see layouts.py for all.

Collectives also run next to computation: those of parallel blocks, and those of micro-batches.
"""

import pytest

from .layouts import cases, compare

CHOSEN = {
    "mixtral": ("hybrid", ["2x1"]),
    "bloom": ("time_share", ["2x1"]),
    "deepseek_v2": ("strict", ["2x1"]),
    "gemma3": ("hybrid", ["1x2"]),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_two_ranks_equal_one(name: str) -> None:
    family, config = next((family, config) for found, family, config in cases(name) if found == name)
    mode, degrees = CHOSEN[name]
    assert compare(family, config, mode, degrees) == ["equal"] * len(degrees)


@pytest.mark.parametrize(("name", "num_ubatches"), [("phi", 1), ("llama", 2)])
def test_two_ranks_with_overlapping_collectives_equal_one(name: str, num_ubatches: int) -> None:
    family, config = next((family, config) for found, family, config in cases(name) if found == name)
    found = compare(family, config, "hybrid", ["2x1"], num_ubatches=num_ubatches, overlap_transfers=True)
    assert found == ["equal"]
