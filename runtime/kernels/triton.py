"""The kernels for GPUs: Triton launchers by op, over the references for what has none. Importing this needs no Triton."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

Kernel = Callable[..., Any]


def why_no_triton() -> str | None:
    """Why the kernels cannot be had here, or None. Whether there is a GPU to run them shows when one is called."""
    return None if find_spec("triton") else "Triton is not installed: pip install sagellm[gpu]"


def triton_kernels(references: Mapping[str, Kernel]) -> Mapping[str, Kernel]:
    """A table as `references` is, with every op that has a Triton kernel replaced; raises ImportError without Triton.

    Launchers are called as references are, ask nothing of the device, and allocate by torch alone, so that a CUDA graph
    can hold them. They compile on their first call with new types or sizes that Triton specialises on.
    """
    from sageLLM.generated.kernels.triton import KERNELS

    return {**references, **KERNELS}
