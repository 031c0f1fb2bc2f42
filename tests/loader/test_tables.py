"""Rope tables that no layout reads yet, compared with transformers."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.rope import RopeSpec, read_rope
from sageLLM.runtime.loader.rope import rope_tables


@pytest.mark.parametrize("share", [0.25, 0.7, 1.0])
def test_proportional_rotation(share: float) -> None:
    scaling = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": share, "factor": 2.0}
    config = LlamaConfig(hidden_size=128, num_attention_heads=4, rope_parameters=scaling)
    expected, factor = ROPE_INIT_FUNCTIONS["proportional"](config, torch.device("cpu"))
    tables = rope_tables(RopeSpec(1e4, 32, 256, scaling), 50)
    angles = torch.outer(torch.arange(50.0), expected)
    torch.testing.assert_close(tables.cos, angles.cos() * factor)
    torch.testing.assert_close(tables.sin, angles.sin() * factor)


def test_an_odd_number_of_rotated_components_is_refused() -> None:
    with pytest.raises(ConfigError, match="number of rotated components of a head must be even, got 5"):
        read_rope(HFConfig({}), base=1e4, dim=5, max_position=8, keys=(), allow=())


def test_longrope_warns_if_short_sequences_use_the_long_factors(caplog: pytest.LogCaptureFixture) -> None:
    factors = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 16.0, **factors}
    short = rope_tables(RopeSpec(1e4, 4, 64, scaling), 16)
    assert not caplog.records
    long = rope_tables(RopeSpec(1e4, 4, 64, scaling), 17)
    assert "max_model_len=17 exceeds the trained length of 16; set max_model_len=16" in caplog.text
    assert not torch.equal(short.sin[:16], long.sin[:16])
    caplog.clear()
    rope_tables(RopeSpec(1e4, 4, 64, {**scaling, "long_factor": factors["short_factor"]}), 17)
    assert not caplog.records
