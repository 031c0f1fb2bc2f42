"""Emits the `__init__.py` of the generated tree and of its tests, which import the tree around them."""

from sageLLM.codegen.render import Output, header


def emit_package() -> list[Output]:
    """`__init__.py` and `tests/__init__.py` with their docstrings; the tables are in the other subpackages."""
    about = "Code generated from specs: ops, kernels, builders, passes, hardware, dialects, formats, docs and tests."
    text = f'"""{about}"""\n'
    tests = '"""Tests of the generated code."""\n'
    return [
        Output("__init__.py", header("specs", "rms_norm") + text),
        Output("tests/__init__.py", header("specs", "tests") + tests),
    ]
