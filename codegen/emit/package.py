"""Emits the generated tree's own `__init__.py`."""

from sageLLM.codegen.render import Output, header


def emit_package() -> list[Output]:
    """`__init__.py` with the docstring of the tree; the tables are in its subpackages."""
    about = "Code generated from specs: ops, kernels, builders, passes, hardware, dialects, formats, docs and tests."
    text = f'"""{about}"""\n'
    return [Output("__init__.py", header("specs", "rms_norm") + text)]
