"""Requirements of the Triton kernels. Importing this module does not import Triton."""

import os
from importlib.util import find_spec

import torch


def why_no_triton(device: torch.device) -> str | None:
    """Why the kernels cannot run on the device, or None. On a CPU they run in Triton's interpreter, for tests."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'sagellm[gpu]'"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels require a GPU; to interpret them on a CPU, which is slow, set TRITON_INTERPRET=1"
    return None
