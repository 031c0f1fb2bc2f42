"""The hardware entry of a GPU, by the name that its driver reports."""

import pytest

from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.executor.device_hardware import entry_for

NAMES = {
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA B200": "b200",
    "AMD Instinct MI300X": "mi300x",
    "NVIDIA GeForce RTX 4090": "rtx_4090",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx_pro_6000",
    "NVIDIA GeForce RTX 3060": None,
    "NVIDIA GH200 480GB": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_entry_of_a_device(name: str) -> None:
    assert entry_for(name, HARDWARE) == NAMES[name]
