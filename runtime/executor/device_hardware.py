"""Hardware entry of the device that runs the model, for forecasts and the schedule of streams."""

import logging
import re
from collections.abc import Iterable
from functools import cache

import torch

from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.core.cost import Hardware

LOG = logging.getLogger("sagellm")
DEFAULT_GPU = "h100"


def hardware_of(device: torch.device) -> Hardware:
    """The entry of a GPU by its name; for a GPU without one that of the H100, with a note in the log."""
    if device.type == "cpu":
        return HARDWARE["cpu"]
    return _hardware_named(torch.cuda.get_device_name(device))


@cache
def _hardware_named(device_name: str) -> Hardware:
    entry = entry_for(device_name, HARDWARE)
    if entry is None:
        LOG.info("no hardware entry for %s: forecasts use %s; see specs/hardware", device_name, DEFAULT_GPU)
    return HARDWARE[entry or DEFAULT_GPU]


def entry_for(device_name: str, entries: Iterable[str]) -> str | None:
    """The entry of which all words occur in the driver's name: `rtx_pro_6000` for "NVIDIA RTX PRO 6000 Blackwell"."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    found = [entry for entry in entries if words.issuperset(entry.split("_"))]
    return max(found, key=len, default=None)
