"""Two ranks against one process, for layouts with experts, latent attention and ALiBi; see layouts.py for all.

Collectives also run next to computation: those of parallel blocks, and those of micro-batches.
"""

import pytest

from .layouts import cases, compare

CHOSEN = {"mixtral": "hybrid", "bloom": "time_share", "deepseek_v2": "strict"}


@pytest.mark.parametrize("name", CHOSEN)
def test_two_ranks_equal_one(name: str) -> None:
    family, config = next((family, config) for found, family, config in cases(name) if found == name)
    assert compare(family, config, CHOSEN[name]) == "equal"


@pytest.mark.parametrize(("name", "num_ubatches"), [("phi", 1), ("llama", 2)])
def test_two_ranks_with_overlapping_collectives_equal_one(name: str, num_ubatches: int) -> None:
    family, config = next((family, config) for found, family, config in cases(name) if found == name)
    assert compare(family, config, "hybrid", num_ubatches=num_ubatches, overlap_transfers=True) == "equal"
