"""Hardware entries by name, or from a file outside the specs."""

from pathlib import Path
from typing import TYPE_CHECKING

from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.core.cost import Efficiency, Hardware, Link

if TYPE_CHECKING:
    from sageLLM.codegen.schema.hardware import HardwareFile, LinkSpec

DEFAULT_HARDWARE = "h100"
SUFFIXES = (".yaml", ".yml")


def find_hardware(name: str | None) -> Hardware:
    """The device of this name, or of this YAML file. Raises ValueError for an unknown name and for an invalid file."""
    name = name or DEFAULT_HARDWARE
    if name.endswith(SUFFIXES):
        return read_hardware(Path(name))
    if name not in HARDWARE:
        raise ValueError(f"--hardware must be one of {', '.join(HARDWARE)}, or a .yaml file, got {name}")
    return HARDWARE[name]


def read_hardware(path: Path) -> Hardware:
    """A device from a file in the form of `specs/hardware`. Raises ValueError with the diagnostics of the file."""
    from sageLLM.codegen.load import load_only
    from sageLLM.codegen.schema.hardware import HardwareFile

    if not path.is_file():
        raise ValueError(f"{path}: expected a hardware file, got no such file")
    spec = load_only(path, str(path), "hardware/v1")
    assert isinstance(spec, HardwareFile), "the class of this schema"
    return _device(spec)


def _device(spec: "HardwareFile") -> Hardware:
    return Hardware(
        name=spec.hardware,
        peak_flops={str(dtype): peak for dtype, peak in spec.peak_flops.items()},
        memory_bandwidth=spec.memory_bandwidth,
        memory_bytes=spec.memory_bytes,
        launch_overhead_us=spec.launch_overhead_us,
        link=_link(spec.link),
        host_link=_link(spec.host_link),
        disk_link=None if spec.disk_link is None else _link(spec.disk_link),
        efficiency={name: Efficiency(**figures.model_dump()) for name, figures in spec.efficiency.items()},
    )


def _link(spec: "LinkSpec") -> Link:
    return Link(spec.bandwidth, spec.latency_us)
