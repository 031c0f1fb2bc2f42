"""Tests of the position tables and caches that layouts declare, as created by the engine."""

import pytest

from sageLLM.generated.builders import MODELS
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import KvShape
from sageLLM.runtime.loader.tables import PositionTables, alibi_slopes


def test_alibi_slopes() -> None:
    """The paper's example of 8 heads; of 12, the four after the first 8 lie between those."""
    assert alibi_slopes(8, 8.0).tolist() == [2.0**-k for k in range(1, 9)]
    assert alibi_slopes(12, 8.0).tolist()[8:] == pytest.approx([2.0 ** -(k / 2) for k in (1, 3, 5, 7)])
    assert alibi_slopes(4, 16.0).tolist() == [2.0 ** -(4 * k) for k in range(1, 5)]


def test_a_rank_has_the_slopes_of_its_heads() -> None:
    layout = MODELS["bloom"]
    whole = layout.read_config(HFConfig(layout.tiny))
    both = layout.shard_config(whole, 2)
    halves, full = (PositionTables(config, 2).tensors["slopes"].tolist() for config in (both, whole))
    assert halves == full[: whole.Nq // 2]


def test_cache_entry_of_a_token() -> None:
    assert (KvShape((2, 8), (2, 8)).num_elements, KvShape((2, 8), (2, 8)).row) == (32, (2, 2, 8))
    assert (KvShape((2, 8), (2, 4)).num_elements, KvShape((2, 8), (2, 4)).row) == (24, (24,))
    assert (KvShape((1, 8), (1, 6), is_shared=True).num_elements, KvShape((1, 8), (1, 6), is_shared=True).row) == (
        8,
        (1, 8),
    )
