"""Writes the fields of passes other than rewrites as class attributes of the generated classes."""

from typing import NamedTuple

from sageLLM.codegen.model.rule import PassDef
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import lit


class Engine(NamedTuple):
    """The hand-written base class of a kind of pass, and its module in `runtime/core/passes`."""

    module: str
    name: str


ENGINES = {
    "merge": Engine("merge", "MergePass"),
    "schedule": Engine("schedule", "StreamPass"),
    "insert": Engine("prefetch", "PrefetchPass"),
    "place": Engine("place", "PlacePass"),
    "allocate": Engine("memory", "MemoryPass"),
    "python": Engine("function", "FunctionPass"),
}
OP_FIELDS = ("join", "split", "send", "recv")
PLAIN_FIELDS = ("limit_bytes", "prefetch_layers", "budget_bytes", "align", "micro_batches", "move")


def fields_of(pass_: PassDef, specs: Specs) -> list[tuple[str, str]]:
    """Name and Python text of each attribute, in the order of the schema."""
    spec = pass_.spec
    fields: list[tuple[str, str]] = []
    if spec.select is not None:
        fields.append(("select", _names([spec.select])))
    fields += [(name, lit(value)) for name in PLAIN_FIELDS if (value := getattr(spec, name))]
    fields += [(name, specs.ops[op].class_name) for name in OP_FIELDS if (op := getattr(spec, name)) is not None]
    if spec.streams:
        entries = [f"{lit(stream)}: {_names(names)}" for stream, names in spec.streams.items()]
        fields.append(("streams", f"{{{', '.join(entries)}}}"))
    if spec.shares:
        shares = [f"{lit(name)}: Share(part={share.part}, speed={share.speed})" for name, share in spec.shares.items()]
        fields.append(("shares", f"{{{', '.join(shares)}}}"))
    if spec.function is not None:
        fields.append(("function", f"staticmethod({'.'.join(function_of(pass_))})"))
    return fields


def function_of(pass_: PassDef) -> tuple[str, str]:
    """The module and the name of the function that a pass of kind python runs."""
    module, _, name = (pass_.spec.function or "").partition(":")
    return module, name


def _names(names: list[str]) -> str:
    return f"frozenset({{{', '.join(map(lit, sorted(names)))}}})"
