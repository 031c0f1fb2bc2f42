"""Emits one `Hardware` constant per hardware file, and the table of all, for the cost model."""

import textwrap

from sageLLM.codegen.contents import Contents
from sageLLM.codegen.load import Entry
from sageLLM.codegen.render import Output, Renderer, header
from sageLLM.codegen.schema.hardware import HardwareFile


def emit_hardware(entry: Entry[HardwareFile], renderer: Renderer) -> list[Output]:
    """`hardware/cpu.py` with `CPU = Hardware(...)` for `specs/hardware/cpu.yaml`."""
    source = textwrap.wrap(f"source: {entry.spec.source}", width=110)
    text = renderer.render("hardware.py.jinja", entry=entry, device=entry.spec, source=source)
    return [Output(f"hardware/{entry.name}.py", header(entry.doc.file, entry.name) + text, (entry.ref,))]


def emit_device_table(contents: Contents, renderer: Renderer) -> list[Output]:
    """`hardware/__init__.py` with HARDWARE."""
    text = renderer.render("hardware_registry.py.jinja", names=[device.name for device in contents.devices])
    return [Output("hardware/__init__.py", header("specs/hardware", "hardware") + text)]
