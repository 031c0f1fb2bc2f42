"""Checks the names in fields of passes: op types, the ops that passes insert into graphs, and Python functions."""

from collections.abc import Mapping
from keyword import iskeyword

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.load import Entry, RawSpecs
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.schema.passes import PassSpec

SIGNATURES = {
    "join": "two inputs and one output",
    "split": "one input, one dim attr (a number of rows) and two outputs",
    "send": "one input and one output",
    "recv": "one input and one output",
}
CORE = "sageLLM.runtime.core.passes."


def check_pass_names(entry: Entry[PassSpec], raw: RawSpecs, ops: Mapping[str, OpDef], sink: Sink) -> None:
    """Reports names in the kind-specific fields of a pass that do not exist or do not fit."""
    spec = entry.spec
    for name, path in _op_types(spec):
        if name not in raw.op_types:
            help = did_you_mean(name, raw.op_types)
            is_key = path[0] == "move"
            span = entry.key_span(*path) if is_key else entry.span(*path)
            sink.error("SAGE302", f"unknown op type '{name}'", span, help)
    for field, expected in SIGNATURES.items():
        name = getattr(spec, field)
        if name is not None and name not in ops:
            sink.error("SAGE306", f"unknown op '{name}'", entry.span(field), did_you_mean(name, ops))
        elif name is not None and not _fits(field, ops[name]):
            message = f"`{field}` must be an op with {expected}, got '{name}'"
            fitting = [op.name for op in ops.values() if _fits(field, op)]
            sink.error("SAGE331", message, entry.span(field), did_you_mean(name, fitting))
    if spec.function is not None:
        _check_function(spec.function, entry, raw, sink)


def _op_types(spec: PassSpec) -> list[tuple[str, tuple[str | int, ...]]]:
    found: list[tuple[str, tuple[str | int, ...]]] = [(spec.select, ("select",))] if spec.select else []
    for stream, names in spec.streams.items():
        found += [(name, ("streams", stream, i)) for i, name in enumerate(names)]
    return [*found, *((name, ("move", name)) for name in spec.move)]


def _fits(field: str, op: OpDef) -> bool:
    counts = {"join": (2, 1), "split": (1, 2), "send": (1, 1), "recv": (1, 1)}[field]
    dims = [attr for attr in op.attrs if attr.type == "dim"]
    return (len(op.inputs), len(op.outputs)) == counts and len(dims) == (field == "split")


def _check_function(text: str, entry: Entry[PassSpec], raw: RawSpecs, sink: Sink) -> None:
    module, _, name = text.partition(":")
    if not all(word.isascii() and word.isidentifier() and not iskeyword(word) for word in (*module.split("."), name)):
        help = f"write for example `{CORE}unread:drop_unread`"
        sink.error("SAGE332", f"expected `package.module:function`, got '{text}'", entry.span("function"), help)
    elif (raw.is_base(entry) or not raw.base_files) and not module.startswith(CORE):
        message = f"a pass of the package must name a function of {CORE}*, got '{module}'"
        sink.error("SAGE332", message, entry.span("function"), "move the function there")
