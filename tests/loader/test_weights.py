"""Loading of weights: the file is not mapped whole while they are copied."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sageLLM.runtime.core.model.weights import Part, WeightSpec
from sageLLM.runtime.loader import safetensors_reader, weights
from sageLLM.runtime.loader.safetensors_reader import Checkpoint


def test_a_file_is_mapped_again_after_a_bounded_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{i}": torch.full((4, 8), float(i)) for i in range(6)}
    save_file(tensors, tmp_path / "model.safetensors")
    opened: list[Path] = []

    def open_counted(path: Path, **options: Any) -> Any:
        opened.append(path)
        return real(path, **options)

    real = safetensors_reader.safe_open
    monkeypatch.setattr(safetensors_reader, "safe_open", open_counted)
    monkeypatch.setattr(weights, "MAPPED_BYTES", 2 * 4 * 8 * 4)  # two tensors
    specs = [WeightSpec(name, (4, 8), (Part(name, (4, 8)),)) for name in tensors]
    found = weights.load_weights(specs, Checkpoint.open(tmp_path), torch.float32, torch.device("cpu"))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert len(opened) == 3
