"""The table of layouts imports a layout when it is first read, in every way that a checkpoint is opened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sageLLM.generated.builders import MODELS
from sageLLM.runtime.core.model.layout_table import LayoutEntry, LayoutTable
from sageLLM.runtime.registry.plugins import load_registry

ROOT = Path(__file__).parents[2]

IMPORTED = """
import sys
from pathlib import Path
{code}
print(*sorted(name.rpartition(".")[2] for name in sys.modules if name.startswith("sageLLM.generated.builders.")))
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from sageLLM import LLM", []),
        ("from sageLLM.generated.builders import MODELS; 'llama' in MODELS, len(MODELS), [*MODELS]", []),
        ("from sageLLM.generated.builders import MODELS; MODELS['qwen3']", ["qwen3"]),
        (
            "from sageLLM.runtime.registry.plugins import load_registry\n"
            "from sageLLM.runtime.loader.config_file import layout_of\n"
            "layout_of({'architectures': ['LlamaForCausalLM']}, Path('config.json'), load_registry().models)",
            ["llama"],
        ),
    ],
    ids=["LLM", "names", "one", "checkpoint"],
)
def test_what_is_imported(code: str, expected: list[str]) -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT / "_dev")}
    command = [sys.executable, "-c", IMPORTED.format(code=code)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


def test_entries_are_those_of_the_layouts() -> None:
    for name, layout in MODELS.items():
        assert layout.name == name
        for architecture in layout.architectures:
            assert layout in MODELS.readers_of(architecture)
    assert MODELS.architectures == {name for layout in MODELS.values() for name in layout.architectures}


def test_an_architecture_with_several_readers() -> None:
    shared = {name for name in MODELS.architectures if len(MODELS.readers_of(name)) > 1}
    assert "Mistral3ForConditionalGeneration" in shared
    assert MODELS.readers_of("NoSuchModel") == []


def test_joined_tables_keep_their_order() -> None:
    other = LayoutTable({"mine": LayoutEntry("sageLLM.generated.builders.llama", "LLAMA", ("MineForCausalLM",))})
    joined = MODELS | other
    assert [*joined] == [*MODELS, "mine"]
    assert joined.readers_of("MineForCausalLM") == [MODELS["llama"]]
    assert joined["bert"] is MODELS["bert"]
    assert "mine" not in MODELS


def test_the_registry_has_the_layouts() -> None:
    assert [*load_registry().models] == [*MODELS]
    with pytest.raises(KeyError):
        load_registry().models["no_such_layout"]
