"""The reason that the engine states for a worker that has failed."""

import pytest

from sageLLM.runtime.kernels.cpu.library import KernelError
from sageLLM.runtime.worker.process import reason_of_failure


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
        KernelError("linear: cannot allocate 458752 bytes of scratch memory"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_errors_of_every_allocator_name_the_options_to_lower(error: Exception) -> None:
    reason = reason_of_failure(error)
    assert reason.startswith("out of memory; lower max_num_batched_tokens or num_kv_blocks, or use more ranks (")
    assert str(error) in reason


def test_other_errors_are_stated_as_they_are() -> None:
    assert reason_of_failure(ValueError("no such block")) == "ValueError: no such block"
