"""What the Triton kernels ask of the place where they run. Importing this needs no Triton."""

import os
from importlib.util import find_spec

import torch


def why_no_triton(device: torch.device) -> str | None:
    """Why the kernels cannot run on the device, or None. On a CPU they run in Triton's interpreter, for tests."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'sagellm[gpu]'"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "they are for GPUs; on a CPU set TRITON_INTERPRET=1 to interpret them, which is slow"
    return None
