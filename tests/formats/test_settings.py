"""Settings and tensors of quantised checkpoints that are not understood: a line with the file, the key and a remedy."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sageLLM import LLM
from sageLLM.runtime.cli.lint import LintRequest, lint_checkpoint
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.format_choice import is_listed, setting
from tests.formats import packers

MakeCheckpoint = Callable[..., Path]
SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 64}
SOURCE = "'quantization_config' in config.json"


@pytest.fixture
def quantised(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Callable[[str], Path]:
    return lambda method: packers.quantise(make_checkpoint("Llama", **SMALL), tmp_path, method)


def check_error(folder: Path, text: str) -> None:
    """The checkpoint is refused in one line, by `LLM` and by `sagellm lint model`."""
    with pytest.raises(CheckpointError) as caught:
        LLM(folder, skip_tokenizer=True)
    assert str(caught.value) == f"{folder}{text}"
    assert lint_checkpoint(LintRequest("model", folder, None, None, (), False)) == 1


def edit_settings(folder: Path, path: str, value: object) -> None:
    """Sets a value of `quantization_config`, at a path such as `config_groups.group_0.targets`."""
    config = json.loads((folder / "config.json").read_text())
    section: dict[str, Any] = config["quantization_config"]
    *steps, last = path.split(".")
    for step in steps:
        section = section[step]
    section[last] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("method", "path", "value", "error"),
    [
        (
            "gptq",
            "bits",
            3,
            f": {SOURCE}: 'bits' must be 4 or 8, got 3; supported are the formats gptq, gptq_v2 of gptq "
            "(docs/formats.md)",
        ),
        (
            "awq",
            "version",
            "gemv",
            f": {SOURCE}: 'version|format' must be absent or gemm, got 'gemv'; supported are the formats awq of awq "
            "(docs/formats.md)",
        ),
        (
            "gptq",
            "group_size",
            0,
            f": {SOURCE}: 'group_size' must be a size from 1 to 1048576, or -1, got 0",
        ),
        (
            "gptq",
            "group_size",
            "16",
            f": {SOURCE}: 'group_size' must be a size from 1 to 1048576, or -1, got '16'",
        ),
        (
            "packed",
            "config_groups",
            [],
            f": {SOURCE}: 'config_groups' must be a mapping with a section, got a list",
        ),
        (
            "packed",
            "config_groups.group_0.targets",
            "Linear",
            f": {SOURCE}: 'config_groups.group_0': 'targets' must be a list of names, got 'Linear'",
        ),
        ("packed", "ignore", {"a": 1}, f": {SOURCE}: 'ignore' must be a list of names, got an object"),
    ],
)
def test_a_wrong_setting(method: str, path: str, value: object, error: str, quantised: Callable[[str], Path]) -> None:
    folder = quantised(method)
    edit_settings(folder, path, value)
    check_error(folder, error)


@pytest.mark.parametrize(
    ("method", "path"),
    [("gptq", "rotation"), ("packed", "transform_config"), ("packed", "config_groups.group_0.weights.codebook")],
)
def test_an_unknown_key(method: str, path: str, quantised: Callable[[str], Path]) -> None:
    """It may change values; an empty one cannot."""
    folder = quantised(method)
    edit_settings(folder, path, {})
    LLM(folder, skip_tokenizer=True)
    edit_settings(folder, path, {"kind": "hadamard"})
    name = path.removeprefix("config_groups.group_0.")
    with pytest.raises(CheckpointError, match=rf"the key '{name}' is not understood by the format .* known are \w+"):
        LLM(folder, skip_tokenizer=True)


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.1.self_attn.q_proj"


def test_missing_scales(quantised: Callable[[str], Path]) -> None:
    folder = quantised("awq")
    edit_tensors(folder, lambda tensors: tensors.__delitem__(f"{Q}.scales"))
    check_error(folder, f" does not match its format 'awq': missing tensor '{Q}.scales' of the format awq")


def test_an_odd_shape(quantised: Callable[[str], Path]) -> None:
    folder = quantised("gptq")
    edit_tensors(folder, lambda tensors: tensors.update({f"{Q}.qzeros": tensors[f"{Q}.qzeros"][:1].clone()}))
    shapes = "expected [2, 8] for i32[K/G, N*b/32], got [1, 8]"
    check_error(folder, f" does not match its format 'gptq': tensor '{Q}.qzeros': {shapes}")


def test_an_odd_type(quantised: Callable[[str], Path]) -> None:
    folder = quantised("int8")
    edit_tensors(folder, lambda tensors: tensors.update({f"{Q}.weight": tensors[f"{Q}.weight"].int()}))
    check_error(folder, f" does not match its format 'compressed_tensors': tensor '{Q}.weight' must be int8, got int32")


def test_a_module_that_is_not_listed(quantised: Callable[[str], Path]) -> None:
    """A float weight among quantised ones must be listed, since a tool may have left it out by mistake."""
    folder = quantised("packed")

    def leave_out(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("weight_packed", "weight_scale", "weight_shape"):
            tensors.pop(f"{Q}.{name}")
        tensors[f"{Q}.weight"] = torch.zeros(64, 64)

    edit_tensors(folder, leave_out)
    other = "model.layers.0.self_attn.q_proj.weight"
    check_error(
        folder,
        f" does not match its format 'compressed_tensors': tensor '{Q}.weight' is not quantised, unlike '{other}', "
        f"and 'ignore' in {SOURCE} does not list it",
    )
    edit_settings(folder, "ignore", ["lm_head", Q])
    LLM(folder, skip_tokenizer=True)
    edit_settings(folder, "ignore", ["lm_head", Q, "re:.*k_proj"])
    with pytest.raises(CheckpointError, match=r"'model.layers.0.self_attn.k_proj' is quantised, although 'ignore'"):
        LLM(folder, skip_tokenizer=True)


def test_a_checkpoint_without_quantised_weights(
    make_checkpoint: MakeCheckpoint, quantised: Callable[[str], Path]
) -> None:
    folder = quantised("awq")
    (folder / "model.safetensors").write_bytes((folder.parent / "plain" / "model.safetensors").read_bytes())
    check_error(
        folder,
        f" does not match its format 'awq': no weight is quantised, although {SOURCE} says so; remove it to "
        "load float weights",
    )


def test_groups_of_settings(quantised: Callable[[str], Path], tmp_path: Path) -> None:
    """Sections with targets: a name comes before a class."""
    folder = quantised("packed")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    other = json.loads(json.dumps(config["config_groups"]["group_0"]))
    other["targets"], other["weights"]["num_bits"] = [r"re:.*\.1\.self_attn\.q_proj$"], 8
    edit_settings(folder, "config_groups", {"group_0": config["config_groups"]["group_0"], "group_1": other})
    random = torch.Generator().manual_seed(5)
    found = packers.packed((64, 64), random, bits=8)
    edit_tensors(folder, lambda tensors: tensors.update({f"{Q}.{key}": x for key, x in found.tensors.items()}))
    weights = LLM(folder, skip_tokenizer=True, kernels="reference").model.weights
    assert any(torch.equal(weight[:64], found.value.float()) for weight in weights.values() if weight.dim() == 2)


def test_listed_modules() -> None:
    assert is_listed("model.layers.1.mlp.gate", ["model.layers.*.mlp.gate"])
    assert is_listed("model.layers.1.mlp.gate", ["mlp.gate"]) and is_listed("model.visual.a", ["visual"])
    assert not is_listed("model.layers.1.mlp.gate_proj", ["mlp.gate"])
    assert is_listed("lm_head", ["re:.*head"]) and not is_listed("lm_head", ["re:(", "head"])


def test_keys() -> None:
    settings = {"a": {"b": [3, 4]}, "c": None, "d": 1}
    assert [setting(settings, key) for key in ("a.b.1", "c|d", "a.x", "a.b.2", "x")] == [4, 1, None, None, None]


def test_lint_reports_the_weights_of_a_quantised_checkpoint(
    quantised: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = quantised("packed")
    assert lint_checkpoint(LintRequest("model", folder, None, None, (), False)) == 0
    assert re.search(r"index +21 tensors, exactly those of the layout", capsys.readouterr().out)
