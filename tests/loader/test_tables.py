"""Rope tables against the frequencies of transformers: by the length of a sequence, and computed in chunks."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.rope import RopeSpec, read_rope
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader import tables
from sageLLM.runtime.loader.rope import rope_rows
from sageLLM.runtime.loader.tables import PositionTables

DIM, TRAINED, LONGEST = 16, 24, 96
FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 24.0, **FACTORS}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


def spec(scaling: dict[str, Any] | None) -> RopeSpec:
    is_dynamic = scaling is not None and scaling["rope_type"] == "dynamic"
    return RopeSpec(1e4, DIM, TRAINED if is_dynamic else LONGEST, scaling)


def make(scaling: dict[str, Any] | None, max_len: int = LONGEST, **more: RopeSpec) -> PositionTables:
    return PositionTables(SimpleNamespace(rope={"": spec(scaling), **more}, alibi=None), max_len)


def reference(scaling: dict[str, Any] | None, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cos and sin of transformers in a forward pass over a sequence of `length` tokens."""
    kind = scaling["rope_type"] if scaling else "default"
    config = LlamaConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        max_position_embeddings=spec(scaling).max_position,
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, **(scaling or {})},
    )
    if scaling is None:
        radians, factor = 1.0 / 1e4 ** (torch.arange(0, DIM, 2).float() / DIM), 1.0
    else:
        radians, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=torch.tensor(length))
    angles = torch.outer(positions.float(), radians)
    return angles.cos() * factor, angles.sin() * factor


def assert_rows(made: PositionTables, rows: np.ndarray, expected: tuple[Tensor, Tensor]) -> None:
    for name, values in zip(("cos", "sin"), expected, strict=True):
        torch.testing.assert_close(made.tensors[name][torch.from_numpy(rows).long()], values)


@pytest.mark.parametrize("share", [0.25, 0.7, 1.0])
def test_proportional_rotation(share: float) -> None:
    """Read by no layout yet."""
    scaling = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": share, "factor": 2.0}
    config = LlamaConfig(hidden_size=128, num_attention_heads=4, rope_parameters=scaling)
    expected, factor = ROPE_INIT_FUNCTIONS["proportional"](config, torch.device("cpu"))
    rows = rope_rows(RopeSpec(1e4, 32, 256, scaling), torch.arange(50), 50)
    angles = torch.outer(torch.arange(50.0), expected)
    torch.testing.assert_close(rows.cos, angles.cos() * factor)
    torch.testing.assert_close(rows.sin, angles.sin() * factor)


def test_an_odd_number_of_rotated_components_is_refused() -> None:
    with pytest.raises(ConfigError, match="number of rotated components of a head must be even, got 5"):
        read_rope(HFConfig({}), base=1e4, dim=5, max_position=8, keys=(), allow=())


@pytest.mark.parametrize("length", [1, 23, 24, 25, 96])
def test_longrope_has_the_rows_of_the_length_of_the_sequence(length: int) -> None:
    made = make(LONGROPE)
    positions = np.arange(length, dtype=np.int32)
    rows = made.rows(positions, length, length)
    assert_rows(made, rows, reference(LONGROPE, torch.arange(length), length))
    assert rows[0] == made.first_row(length) == (24 if length > 24 else 0)


@pytest.mark.parametrize("prompt", [1, 23, 24, 25, 60])
def test_dynamic_has_the_rows_of_the_prompt_and_then_of_each_length(prompt: int) -> None:
    """As transformers with a KV cache: a forward pass over the prompt, then one per token."""
    made = make(DYNAMIC)
    made.begin_step()
    parts = [np.arange(0, prompt // 2, dtype=np.int32), np.arange(prompt // 2, LONGEST, dtype=np.int32)]
    rows = np.concatenate([made.rows(part, LONGEST, prompt) for part in parts if len(part)])
    assert_rows(made, rows[:prompt], reference(DYNAMIC, torch.arange(prompt), prompt))
    for position in range(prompt, LONGEST):
        expected = reference(DYNAMIC, torch.tensor([position]), position + 1)
        assert_rows(made, rows[position : position + 1], expected)


def test_dynamic_prompts_of_one_step_have_separate_rows() -> None:
    made = make(DYNAMIC)
    for _ in range(2):
        made.begin_step()
        lengths = (30, 40)
        rows = [made.rows(np.arange(length, dtype=np.int32), length, length) for length in lengths]
        for row, length in zip(rows, lengths, strict=True):
            assert_rows(made, row, reference(DYNAMIC, torch.arange(length), length))
        assert not set(rows[0]) & set(rows[1])


def test_dynamic_prompts_that_have_too_many_tokens_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MIN_STEP_ROWS", 1)
    made = make(DYNAMIC)
    made.rows(np.arange(60, dtype=np.int32), 60, 60)
    with pytest.raises(ValueError, match="at most 96 prompt tokens beyond the trained length of 24, got 120; lower"):
        made.rows(np.arange(60, dtype=np.int32), 60, 60)


@pytest.mark.parametrize(
    ("scaling", "max_len"),
    [(None, LONGEST), (LONGROPE, TRAINED), (DYNAMIC, TRAINED), ({**LONGROPE, "long_factor": [1.0] * 8}, LONGEST)],
    ids=["none", "longrope within the trained length", "dynamic within it", "equal factors"],
)
def test_lengths_that_do_not_matter(scaling: dict[str, Any] | None, max_len: int) -> None:
    scaling = scaling and {**scaling, "short_factor": [1.0] * 8} if max_len == LONGEST else scaling
    made = make(scaling, max_len)
    assert (made.switch_len, made.dynamic_len, made.salt(max_len)) == (None, None, "")
    rows = made.rows(np.arange(max_len, dtype=np.int32), max_len, max_len)
    assert rows.tolist() == list(range(max_len)) and len(made.tensors["cos"]) == max_len
    assert_rows(made, rows, reference(scaling, torch.arange(max_len), max_len))


def test_salts_differ_where_the_keys_of_a_prompt_do() -> None:
    made = make(DYNAMIC)
    assert made.salt(TRAINED) == made.salt(1) == ""
    assert len({made.salt(length) for length in (24, 25, 26)}) == 3


@pytest.mark.parametrize("scaling", [None, LONGROPE, DYNAMIC], ids=["none", "longrope", "dynamic"])
@settings(max_examples=20)
@given(steps=st.lists(st.integers(0, LONGEST), max_size=8), chunk=st.integers(1, LONGEST))
def test_rows_do_not_depend_on_the_steps_that_computed_them(
    scaling: dict[str, Any] | None, steps: list[int], chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "ROWS_AT_ONCE", chunk)
        made, whole = make(scaling), make(scaling)
        whole.fill(LONGEST)
        for step in steps:
            made.fill(step)
            assert step <= made.num_filled <= LONGEST
        for long in (False, True):
            n = min(made.num_filled, TRAINED if not long and scaling is LONGROPE else LONGEST)
            rows = torch.arange(n) + made.first_row(LONGEST if long else 1)
            for name in ("cos", "sin"):
                assert torch.equal(made.tensors[name][rows], whole.tensors[name][rows])


def test_only_the_rows_in_use_are_computed() -> None:
    made = make(None, 10_000_000)
    assert made.num_filled == tables.ROWS_AT_ONCE
    made.rows(np.array([5000], np.int32), 5001, 1)
    assert 5000 < made.num_filled < 10_000
    assert made.tensors["cos"].shape == (10_000_000, DIM // 2)


def test_tables_that_cannot_be_combined() -> None:
    with pytest.raises(CheckpointError, match=r"one trained length, got \[24, 48\]"):
        make(LONGROPE, other=spec({**LONGROPE, "original_max_position_embeddings": 48.0}))
    with pytest.raises(CheckpointError, match="longrope and dynamic scaling must not be combined"):
        make(LONGROPE, other=spec(DYNAMIC))


def test_a_device_that_allocates_all_rows_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(rope={"": spec(None)}, alibi=None)
    with pytest.raises(CheckpointError, match="16777216 positions must have at most 768 MiB, got 1024; pass a lower"):
        PositionTables(config, 2**24, "meta")
