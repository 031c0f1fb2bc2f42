"""Checks the section `hf` of layouts: architectures, the section of config.json, and the names of tensors."""

import re
from collections.abc import Iterable, Mapping

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.facts import ARCHITECTURE, claim_both
from sageLLM.codegen.link.config import CONFIG_KEY
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.layout import BlockDef, WeightDef
from sageLLM.codegen.schema.models import ModelFile

_BEGINNING = re.compile(r"[A-Za-z0-9_.-]*\Z")


def check_architectures(models: Iterable[Entry[ModelFile]], sink: Sink) -> None:
    """Reports architectures that several layouts read: the layout of a checkpoint must be unambiguous."""
    owners: dict[str, list[Entry[ModelFile]]] = {}
    for entry in models:
        for i, architecture in enumerate(entry.spec.hf.architectures):
            span = entry.span("hf", "architectures", i)
            if not ARCHITECTURE.match(architecture):
                message = f"expected the name of an architecture, got '{architecture}'"
                sink.error("SAGE204", message, span, "use letters, digits and `_`")
            readers = owners.setdefault(architecture, [])
            types = entry.spec.hf.model_types
            owner = next((one for one in readers if claim_both(one.spec.hf.model_types, types)), None)
            if owner is not None:
                first = (f"read by '{owner.name}'", owner.span("hf", "architectures"))
                message = f"the architecture '{architecture}' must be read by one layout only"
                help = "remove it from one of them, or tell them apart by `root` and `model_types`"
                sink.error("SAGE231", message, span, help, (first,))
            readers.append(entry)


def check_checkpoint_names(entry: Entry[ModelFile], weights: Iterable[WeightDef], sink: Sink) -> None:
    """Reports an invalid `root`, and a `prefix` or a name in `names` that no tensor name begins with."""
    spec = entry.spec.hf
    if spec.root is not None and not CONFIG_KEY.match(spec.root):
        message = f"expected a key of config.json, got '{spec.root}'"
        sink.error("SAGE206", message, entry.span("hf", "root"), "write key or outer.key")
    tensors = {part.hf for weight in weights for part in weight.parts}
    if spec.prefix and not any(name.startswith(spec.prefix) for name in tensors):
        help = "write the common beginning of the tensor names, with the dot: `prefix: model.`"
        message = f"no tensor name begins with the prefix '{spec.prefix}'"
        sink.error("SAGE212", message, entry.span("hf", "prefix"), help)
    for name, stored in spec.names.items():
        if not any(tensor.startswith(name) for tensor in tensors):
            help = "write the beginning of the layout's tensor names, with the dot: `names: {model.: [...]}`"
            message = f"no tensor name begins with '{name}'"
            sink.error("SAGE212", message, entry.key_span("hf", "names", name), help)
        for one in (stored,) if isinstance(stored, str) else stored:
            if not _BEGINNING.match(one):
                message = f"expected the beginning of a tensor name, got '{one}'"
                help = "use letters, digits, `.`, `_` and `-`"
                sink.error("SAGE212", message, entry.span("hf", "names", name), help)


def shared_prefix(own: Iterable[WeightDef], blocks: Iterable[BlockDef]) -> str:
    """The first component that the tensor names of all blocks share with a weight outside the layers, as `model.`.

    It is the name of the module without the head, whose own checkpoints lack it.
    """
    in_layers = {_first_component(part.hf) for block in blocks for weight in block.weights for part in weight.parts}
    outside = {_first_component(part.hf) for weight in own if not weight.is_per_layer for part in weight.parts}
    return next(iter(in_layers)) if len(in_layers) == 1 and in_layers <= outside else ""


def _first_component(name: str) -> str:
    return "".join(name.partition(".")[:2])


def tiny_config(entry: Entry[ModelFile], keys: Mapping[str, object]) -> dict[str, object]:
    """The config for tests: the keys in the section `root`, if there is one, except those that begin with `/`."""
    spec = entry.spec.hf
    architectures = {"architectures": spec.architectures[:1]}
    if spec.root is None:
        return {**keys, **architectures}
    section: dict[str, object] = {key: value for key, value in keys.items() if not key.startswith("/")}
    section |= {"model_type": spec.model_types[0]} if spec.model_types else {}
    for step in reversed(spec.root.split(".")):
        section = {step: section}
    outside = {key[1:]: value for key, value in keys.items() if key.startswith("/")}
    return {**section, **outside, **architectures}
