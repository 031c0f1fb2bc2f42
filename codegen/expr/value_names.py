"""The names that a value of the compute language may have."""

import builtins
import keyword
import re

from sageLLM.codegen.expr.functions import FUNCTIONS
from sageLLM.codegen.expr.scope import Scope
from sageLLM.codegen.expr.types import DIM_NAME
from sageLLM.codegen.names import VALUES

_PYTHON = frozenset([*keyword.kwlist, *dir(builtins)]) - {"input", "sum", "min", "max", "abs", "pow", "round"}
_KERNEL = VALUES | {"tile"}
_NODE = frozenset(
    {"attr_types", "attrs", "block", "byte_formula", "bytes_moved", "copy", "dependencies", "device_id", "dims"}
    | {"estimated_time_us", "flop_formula", "flops", "infer", "inference", "inplace", "input", "input_types", "inputs"}
    | {"kind", "layer_id", "memory_bytes", "metadata", "node_id", "op", "op_type", "operands", "optional_input"}
    | {"optional_inputs", "origins", "output", "output_types", "outputs", "problems", "resolve", "self", "spec"}
    | {"stream_id", "tags", "verify", "where", "is_view", "resolve_refs"} | {"cls", "g", "name", "names"}
)  # fmt: skip
_VALUE = re.compile(r"[a-z][a-z0-9_]{0,39}\Z")
RESERVED = _PYTHON | _KERNEL
RESERVED_FOR_OPERANDS = RESERVED | _NODE
"""Names that generated code uses itself: keywords, builtins, modules; for operands also members of nodes."""


def why_not_a_value_name(name: str, scope: Scope, reserved: frozenset[str] = RESERVED) -> str | None:
    """Why a value must not have this name, or None."""
    if name in FUNCTIONS or name in scope.elements or name in ("true", "false"):
        return f"'{name}' is a keyword of the compute language"
    if name in scope.dims or DIM_NAME.match(name):
        return f"the name of a value must begin with a lower-case letter, got '{name}'"
    if name in scope.values or name in scope.attrs:
        return f"'{name}' is already defined as an operand, view or attr"
    if name.startswith("_") or name in reserved:
        return f"'{name}' is reserved for generated code"
    if not _VALUE.match(name):
        return f"'{name}' must consist of at most 40 lower-case letters, digits and `_`"
    return None
