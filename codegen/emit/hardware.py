"""Emits one `Hardware` constant per hardware file, for the cost model."""

from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header
from sageLLM.codegen.schema.hardware import HardwareFile


def emit_hardware(specs: Specs, renderer: Renderer) -> list[Output]:
    """`hardware/cpu.py` with `CPU = Hardware(...)` for `specs/hardware/cpu.yaml`, and the table of all."""
    entries = [entry for entry in specs.hardware.values() if not specs.raw.is_base(entry)]
    return [_device(entry, renderer) for entry in entries] + [_registry(entries, renderer)]


def _device(entry: Entry[HardwareFile], renderer: Renderer) -> Output:
    text = renderer.render("hardware.py.jinja", entry=entry, device=entry.spec)
    return Output(f"hardware/{entry.name}.py", header(entry.doc.file, entry.name) + text, (entry.ref,))


def _registry(entries: list[Entry[HardwareFile]], renderer: Renderer) -> Output:
    text = renderer.render("hardware_registry.py.jinja", names=[entry.name for entry in entries])
    return Output("hardware/__init__.py", header("specs/hardware", "hardware") + text)
