"""Links sizes in a layout, which are expressions over config names."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.syntax import Refused, Text, parse_expression
from sageLLM.codegen.expr.types import dim_text, size_of
from sageLLM.codegen.link.flat_layout import Located
from sageLLM.codegen.model.layout import ConfigName
from sageLLM.codegen.schema.models import WeightSpec
from sageLLM.codegen.schema.sources import Source

YamlPath = tuple[str | int, ...]


def link_size(text: Text, config: Mapping[str, ConfigName], steps: Mapping[str, object] = {}) -> Size:
    """A size over config names, and over dims of the step where these are allowed; raises Refused after a finding."""
    node = parse_expression(text)
    known = [name for name, found in config.items() if found.type == "size"]
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and inner.id not in known and inner.id not in steps:
            help = did_you_mean(inner.id, [*known, *steps])
            raise text.refuse("SAGE210", f"expected a size of this layout, got '{inner.id}'", inner, help)
    size = size_of(node, text, dict.fromkeys([*known, *steps]))
    return Size(size.terms, text=dim_text(node))


@dataclass(frozen=True, slots=True)
class SizeLinker:
    """Links the sizes of one weight, with findings at the weight's lines."""

    name: str
    located: Located[WeightSpec]
    config: Mapping[str, ConfigName]
    sink: Sink

    def size(self, size: int | str, path: YamlPath) -> Size:
        """A number of at least 1, or an expression; raises Refused after a finding."""
        if isinstance(size, str):
            return link_size(self.located.text(size, self.sink, *path), self.config)
        if size < 1:
            span = self.located.span(*path)
            self.sink.error("SAGE210", f"a size must be at least 1, got {size}", span, "write a positive number")
            raise Refused
        return Size.of(size)

    def is_size(self, name: str) -> bool:
        return name in self.config and self.config[name].type == "size"

    def refuse(self, message: str, path: YamlPath, help: str, code: str = "SAGE211") -> Refused:
        """Reports a finding; raise what it returns."""
        self.sink.error(code, message, self.located.span(*path), help)
        return Refused(message)


def size_texts(weight: WeightSpec) -> list[str]:
    """All texts of a weight that may name sizes; they may contain other names, which callers ignore."""
    segments = (weight.tp.segments if weight.tp else None) or []
    return [str(text) for text in (*weight.shape, *segments, *_source_texts(weight.hf))]


def _source_texts(source: Source) -> Iterator[int | str]:
    if isinstance(source, str):
        return
    if isinstance(source.concat, dict):
        yield from source.concat.values()
    for item in source.concat if isinstance(source.concat, list) else ():
        yield item.size
        yield from _source_texts(item.of)
    if source.stack is not None:
        yield source.stack.over
        yield from _source_texts(source.stack.of)
    if source.transpose is not None:
        yield from _source_texts(source.transpose)
    yield from (source.rearrange or "", *source.sizes.values(), *source.take.values())
