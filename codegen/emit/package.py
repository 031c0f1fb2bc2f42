"""Emits the generated tree's own `__init__.py`."""

from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header


def emit_package(specs: Specs, renderer: Renderer) -> list[Output]:
    """`__init__.py`, which says what the tree is; the tables are in its subpackages."""
    text = '"""Code generated from specs: ops, kernels, builders, passes, hardware, docs and tests."""\n'
    return [Output("__init__.py", header("specs", "rms_norm") + text)]
