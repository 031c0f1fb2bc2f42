"""Dense families since 2024 against transformers: greedy tokens and prompt log-probabilities."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .test_oracle import check_all_modes

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "starcoder2": ("Starcoder2", {}),
    "starcoder2 with a window, untied, without biases": (
        "Starcoder2",
        {"sliding_window": 7, "tie_word_embeddings": False, "use_bias": False},
    ),
    "arcee": ("Arcee", {}),
    "arcee with biases, own head_dim": ("Arcee", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "seed_oss": ("SeedOss", {"head_dim": 24}),
    "seed_oss with every bias": ("SeedOss", {"head_dim": 32, "attention_out_bias": True, "mlp_bias": True}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 24}),
    "ernie4_5 with biases, untied": ("Ernie4_5", {"head_dim": 16, "use_bias": True, "tie_word_embeddings": False}),
    "glm": ("Glm", {"head_dim": 16}),
    "glm without biases, tied": ("Glm", {"head_dim": 32, "attention_bias": False, "tie_word_embeddings": True}),
}

MakeCheckpoint = Callable[..., Path]


@pytest.mark.parametrize("case", CASES)
def test_engine_equals_transformers_in_every_mode(case: str, make_checkpoint: MakeCheckpoint) -> None:
    family, config = CASES[case]
    check_all_modes(make_checkpoint(family, **config))
