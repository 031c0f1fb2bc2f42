"""A pipeline stage loads its own weights only, and a tied head without the embedding that it is tied to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sageLLM.runtime.loader.model import Model, load_model
from sageLLM.runtime.registry.plugins import load_registry


def stages(folder: Path, pp: int, pp_layer_partition: str | None = None) -> list[Model]:
    registry, device = load_registry(), torch.device("cpu")
    options: dict[str, Any] = {"dtype": "float32", "device": device, "max_model_len": None, "pp": pp}
    options["pp_layer_partition"] = pp_layer_partition
    return [load_model(folder, registry, rank=rank, **options) for rank in range(pp)]


def test_stages_divide_the_weights(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("Llama", tie_word_embeddings=True, num_hidden_layers=5)
    (whole,) = stages(folder, 1)
    first, middle, last = stages(folder, 3)
    assert [list(stage.layers) for stage in (first, middle, last)] == [[0, 1], [2, 3], [4]]
    assert {name for name in first.weights if not name.startswith("layers.")} == {"embed"}
    assert not [name for name in middle.weights if not name.startswith("layers.")]
    assert {name for name in last.weights if not name.startswith("layers.")} == {"norm", "lm_head"}
    assert torch.equal(last.weights["lm_head"], whole.weights["embed"]) and not last.ties
    assert sum(len(stage.weights) for stage in (first, middle, last)) == len(whole.weights)
    for stage in (first, middle, last):
        for name, weight in stage.weights.items():
            assert torch.equal(weight, whole.weights[name]), name
