"""Limits of this machine as a hardware entry, measured in about a second."""

from dataclasses import replace

from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.bench.limits import measure_limits
from sageLLM.runtime.core.cost import Hardware, Link
from sageLLM.runtime.executor.kernel_choice import make_runner
from sageLLM.runtime.registry.plugins import load_registry

SECONDS = 0.1
"""The time of each measurement."""


def this_machine() -> Hardware:
    """The rates with as many threads as torch uses; `sagellm bench hardware` measures longer. Raises CompileError."""
    limits = measure_limits(make_runner(load_registry()).library, SECONDS)
    name = f"this machine, {limits.threads} thread{'s' * (limits.threads > 1)}"
    return replace(
        HARDWARE["cpu"],
        name=name,
        peak_flops=limits.peak_flops,
        memory_bandwidth=limits.read,
        host_link=Link(limits.copy / 2, 0.0),  # a copy counts both directions
        disk_link=Link(limits.disk_read, 0.0) if limits.disk_read else None,
    )
