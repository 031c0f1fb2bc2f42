"""sageLLM: specs in YAML, generated graphs and kernels, and a thin runtime that serves them.

The package consists of the repository's top-level folders (`codegen`, `generated`, `runtime`, `specs`, `templates`).
The names below are imported on first use, so that `import sageLLM` does not import torch.
"""

import gc
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sageLLM.runtime.engine.async_llm import AsyncLLM
    from sageLLM.runtime.engine.llm import LLM
    from sageLLM.runtime.sampling.sampling_params import SamplingParams
    from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "PDSchedulerConfig", "SamplingParams", "__version__"]

_MODULES = {
    "AsyncLLM": "sageLLM.runtime.engine.async_llm",
    "LLM": "sageLLM.runtime.engine.llm",
    "PDSchedulerConfig": "sageLLM.runtime.scheduler.pd_scheduler",
    "SamplingParams": "sageLLM.runtime.sampling.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_imported(_MODULES[name]), name)


def _imported(name: str) -> ModuleType:
    """Imports a module without garbage collections, which free nothing there and take a tenth of the time.

    Later collections omit the objects that exist by then, 200,000 with those of torch: a full collection takes 0.1 s
    with them, in the middle of a step.
    """
    is_first = name not in sys.modules
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return import_module(name)
    finally:
        if is_first:
            gc.freeze()
        if was_enabled:
            gc.enable()
