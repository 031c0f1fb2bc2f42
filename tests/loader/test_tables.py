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
