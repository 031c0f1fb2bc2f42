"""Fixtures for all tests: random checkpoints made by transformers, linked specs, snapshots in text files.

After a long run the slowest files are printed, so that their growth is seen: `make test` has a budget of 420 s.
"""

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from sageLLM.codegen.link.memo import LinkMemo

# Tests run on loaded machines: how long an example takes is no failure.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")

MakeCheckpoint = Callable[..., Path]

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}


LONG_RUN_SECONDS = 60
NUM_SLOWEST = 15


def pytest_collection_finish() -> None:
    """Exempts the modules of tests and libraries, which stay until the end, from garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the files whose tests, with their fixtures, took most of a long run."""
    reports = [one for reports in terminalreporter.stats.values() for one in reports]
    seconds: Counter[str] = Counter()
    for report in reports:
        if isinstance(report, pytest.TestReport):
            seconds[report.location[0]] += report.duration
    if (total := seconds.total()) < LONG_RUN_SECONDS:
        return
    terminalreporter.section(f"slowest files of {total:.0f} s")
    for file, duration in seconds.most_common(NUM_SLOWEST):
        terminalreporter.write_line(f"{duration:6.1f} s {duration / total:4.0%}  {file}")


class TextFile(SingleFileSnapshotExtension):
    """A snapshot in a separate text file, so that parallel branches can add layouts."""

    _write_mode = WriteMode.TEXT
    file_extension = "txt"


@pytest.fixture
def text_file(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    return snapshot.use_extension(TextFile)


@pytest.fixture(scope="session")
def memo() -> LinkMemo:
    """An argument of `driver.load_and_link`, which then links only what earlier tests have not linked."""
    return LinkMemo()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """make_checkpoint("Llama", **config) -> folder; every parameter is drawn, norms and biases too.

    With `text_config`, the family is a model with images; its text model has the small sizes. Equal arguments return
    the same folder.
    """
    made: dict[str, Path] = {}

    def make(family: str, *, seed: int = 0, max_shard_size: str = "5GB", **config: Any) -> Path:
        key = repr((family, seed, max_shard_size, sorted(config.items(), key=repr)))
        if key not in made:
            folder = tmp_path_factory.mktemp(family.lower())
            save_random_model(folder, family, seed, max_shard_size, small_config(config))
            made[key] = folder
        return made[key]

    return make


def small_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config with small sizes, in the section of the text model if there is one."""
    text = config.get("text_config")
    return SMALL | config if text is None else config | {"text_config": SMALL | text}


def save_random_model(folder: Path, family: str, seed: int, max_shard_size: str, config: dict[str, Any]) -> None:
    """Saves a model of transformers of the family `Llama`, or bare as `LlamaModel`, all of whose numbers are drawn."""
    import torch
    import transformers

    is_bare = family.endswith("Model")
    settings = getattr(transformers, f"{family.removesuffix('Model')}Config")(**config)
    auto = transformers.AutoModelForImageTextToText if "text_config" in config else transformers.AutoModelForCausalLM
    model = (transformers.AutoModel if is_bare else auto).from_config(settings)
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved and buffer.is_floating_point()]
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *buffers]:
            noise = torch.randn(parameter.shape, generator=generator)
            owner = name.split(".")[-2:][0]
            centre = 1.0 if "norm" in owner or owner.startswith("ln_") else 0.0
            scale = 0.2 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(centre + scale * noise)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
