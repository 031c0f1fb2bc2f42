"""Triton without a GPU or a compiler: launchers bind and specialise their arguments, and compilations are recorded."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

DEVICES = itertools.count(99)
"""Numbers of devices: the JIT keeps kernels by device."""


class NoKernel:
    """The result of a compilation: launching it does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        return None


@contextmanager
def recorded_compilations() -> Iterator[list[str]]:
    """The names of the kernels that the JIT of an H100 would compile in a block, one for each specialisation."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from ..kernels.triton.compile_ahead import TARGETS, Stub

    compiled: list[str] = []

    def record(self: Any, key: Any, signature: Any, device: int, *rest: Any) -> NoKernel:
        compiled.append(self.fn.__name__)
        self.device_caches[device][0][key] = kernel = NoKernel()
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "_do_compile", record)
        patch.setattr(driver, "_active", Stub(TARGETS["sm_90"], next(DEVICES)))
        yield compiled


def launched(references: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Kernels that call the launcher of Triton, for its compilations, and return the result of the reference."""
    from sageLLM.generated.kernels.triton import KERNELS

    def both(launcher: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
        def call(*operands: Any, **attrs: Any) -> Any:
            launcher(*operands, **attrs)
            return reference(*operands, **attrs)

        return call

    return {op: both(launcher, references[op]) for op, launcher in KERNELS.items()}
