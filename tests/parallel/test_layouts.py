"""Two ranks against one process, for layouts with experts, latent attention and ALiBi; see layouts.py for all."""

import pytest

from .layouts import cases, compare

CHOSEN = {"mixtral": "hybrid", "bloom": "time_share", "deepseek_v2": "strict"}


@pytest.mark.parametrize("name", CHOSEN)
def test_two_ranks_equal_one(name: str) -> None:
    family, config = next((family, config) for found, family, config in cases(name) if found == name)
    assert compare(family, config, CHOSEN[name]) == "equal"
