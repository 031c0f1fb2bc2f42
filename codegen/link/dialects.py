"""Links dialects: parses their patterns, and checks that answers can be read and written by them."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.load import Entry, RawSpecs
from sageLLM.codegen.model.dialect import DialectDef, Element, FormDef
from sageLLM.codegen.schema.dialects import CallsSpec, DialectFile, FormSpec, ReasoningSpec
from sageLLM.codegen.source import YamlPath

_TOKEN = re.compile(r"\{\{|\}\}|\{\?([^{}]*)\}|\{(\w*)\}|[{}]")
_OF_IDS = ("hex", "alnum9", "name", "index")
_IDENTIFIER = re.compile(r"[A-Za-z0-9_.-]+")


def link_dialects(raw: RawSpecs, sink: Sink) -> dict[str, DialectDef]:
    """All dialects by name, in spec order; findings are reported."""
    found = {name: _Linker(entry, sink).link() for name, entry in raw.dialects.items()}
    _check_detection(raw, sink)
    return found


@dataclass(frozen=True, slots=True)
class _Linker:
    """One entry."""

    entry: Entry[DialectFile]
    sink: Sink

    def link(self) -> DialectDef:
        spec = self.entry.spec
        if spec.calls is None and spec.reasoning is None:
            message = f"'{self.entry.name}' describes neither calls nor reasoning"
            self.sink.error("SAGE704", message, self.entry.span("dialect"), "add `calls:` or `reasoning:`")
        for i, text in enumerate(spec.skip):
            self._require_mark(text, ("skip", i), "a mark that is left out")
        for i, alias in enumerate(spec.aliases):
            if not _IDENTIFIER.fullmatch(alias):
                message = f"the alias {alias!r} must contain only letters, digits, `_`, `-` and `.`"
                self.sink.error("SAGE705", message, self.entry.span("aliases", i), "rename it")
        forms, each = self._calls(spec.calls) if spec.calls else ((), ())
        block = self._block(spec.reasoning) if spec.reasoning else None
        return DialectDef(self.entry, forms, each, block)

    def _calls(self, calls: CallsSpec) -> tuple[tuple[FormDef, ...], tuple[Element, ...]]:
        forms = tuple(self._form(form, calls, ("calls", "forms", i)) for i, form in enumerate(calls.forms))
        holes = {element.text for form in forms for element in form.call if element.kind == "hole"}
        for field, hole in (("keys", "object"), ("arguments", "arguments")):
            if getattr(calls, field) is not None and hole not in holes:
                message = f"`{field}` is unused: no form has {{{hole}}}"
                self.sink.error("SAGE704", message, self.entry.key_span("calls", field), "remove it, or use the hole")
        if calls.keys is None and "object" in holes:
            message = "{object} requires `keys`"
            self.sink.error("SAGE704", message, self.entry.key_span("calls", "forms"), "add `keys: {name: name, ...}`")
        each = self._each(calls.arguments.each) if calls.arguments else ()
        self._parse(calls.ids, ("calls", "ids"), _OF_IDS)
        return forms, each

    def _form(self, form: FormSpec, calls: CallsSpec, path: YamlPath) -> FormDef:
        call = self._parse(form.call, (*path, "call"), ("object", "name", "arguments", "id", "index"))
        names = [element.text for element in call if element.kind == "hole"]
        if set(names) - {"id", "index"} not in ({"object"}, {"name", "arguments"}, {"name"}):
            message = "a call must have the hole {object}, or {name} and {arguments}"
            self.sink.error("SAGE702", message, self.entry.span(*path, "call"), "add the missing hole")
        elif "arguments" in names and names.index("arguments") < names.index("name"):
            message = "{name} must be before {arguments}, which are streamed"
            self.sink.error("SAGE702", message, self.entry.span(*path, "call"), "describe another form")
        first = call[0] if call else Element("text", "")
        is_marked = bool(form.open.strip() or (first.kind == "text" and first.text.strip()))
        if not is_marked and not (first == Element("hole", "object") and form.at == "start"):
            message = "a form must begin with a mark, or with {object} `at: start`"
            help = "add a mark to `open` or to the beginning of `call`"
            self.sink.error("SAGE703", message, self.entry.span(*path, "call"), help)
        return FormDef(call, form.open, form.separator, form.close, form.at == "start")

    def _each(self, text: str) -> tuple[Element, ...]:
        path: YamlPath = ("calls", "arguments", "each")
        each = self._parse(text, path, ("key", "value", "python"))
        names = [element.text for element in each if element.kind == "hole"]
        if names not in (["key", "value"], ["key", "python"]):
            message = "an argument must have the holes {key} and {value}, or {key} and {python}"
            self.sink.error("SAGE702", message, self.entry.span(*path), "add the missing hole")
        elif names[1] == "value" and not (each[-1].kind == "text" and each[-1].text.strip()):
            message = "{value} must be followed by a mark, up to which it extends"
            self.sink.error("SAGE703", message, self.entry.span(*path), "add the mark")
        return each

    def _block(self, reasoning: ReasoningSpec) -> tuple[str, str]:
        path: YamlPath = ("reasoning", "block")
        block = self._parse(reasoning.block, path, ("text",))
        if [element.kind for element in block] != ["text", "hole", "text"] or not all(
            element.text.strip() for element in block
        ):
            message = "a block must be a mark, {text} and a mark"
            help = 'write, for example, "<think>{text}</think>"'
            self.sink.error("SAGE703", message, self.entry.span(*path), help)
            return "?", "?"
        if reasoning.then and reasoning.then not in self.entry.spec.skip:
            message = "`then` must be one of the marks in `skip`, so that it is left out"
            self.sink.error("SAGE704", message, self.entry.span("reasoning", "then"), "add it to `skip`")
        return block[0].text, block[2].text

    def _require_mark(self, text: str, path: YamlPath, what: str) -> None:
        if not text.strip():
            self.sink.error("SAGE703", f"{what} must have a visible character", self.entry.span(*path), "remove it")

    def _parse(self, text: str, path: YamlPath, allowed: Collection[str]) -> tuple[Element, ...]:
        """The elements of a pattern."""
        elements: list[Element] = []
        place = self.entry.span(*path)
        for kind, part in tokens(text):
            if kind == "brace":
                self.sink.error("SAGE701", f"unmatched '{part}'", place, "write {{ or }} for a brace")
            elif kind == "hole" and part not in allowed:
                self.sink.error("SAGE701", f"unknown hole {{{part}}}", place, did_you_mean(part, allowed))
            elif kind == "hole" and Element("hole", part) in elements:
                self.sink.error("SAGE702", f"{{{part}}} occurs twice", place, "remove one")
            elif kind == "hole" and path[-1] != "ids" and elements and not _can_follow(part, elements[-1]):
                self.sink.error("SAGE702", f"{{{part}}} follows a hole", place, "add a text in between")
            elif kind == "text" and elements and elements[-1].kind == "text":
                elements[-1] = Element("text", elements[-1].text + part)
            else:
                elements.append(Element(kind, part))
        return tuple(elements)


def _can_follow(hole: str, before: Element) -> bool:
    """A name ends at the brace of its arguments; after other holes there must be a text."""
    return before.kind != "hole" or (before.text, hole) == ("name", "arguments")


def tokens(text: str) -> Iterable[tuple[str, str]]:
    """The parts of a pattern, each with its kind: text, maybe, hole or brace."""
    start = 0
    for match in _TOKEN.finditer(text):
        if match.start() > start:
            yield "text", text[start : match.start()]
        start = match.end()
        if match[0] in ("{{", "}}"):
            yield "text", match[0][0]
        elif match[1] is not None:
            yield "maybe", match[1]
        elif match[2] is not None:
            yield "hole", match[2]
        else:
            yield "brace", match[0]
    if start < len(text):
        yield "text", text[start:]


def _check_detection(raw: RawSpecs, sink: Sink) -> None:
    """Two dialects that the same templates detect could not be told apart."""
    for section in ("calls", "reasoning"):
        seen: dict[frozenset[str], Entry[DialectFile]] = {}
        for entry in raw.dialects.values():
            part: CallsSpec | ReasoningSpec | None = getattr(entry.spec, section)
            if part is None:
                continue
            other = seen.setdefault(frozenset(part.detect), entry)
            if other is not entry:
                message = f"'{entry.name}' and '{other.name}' are detected by the same texts"
                related = (("the other one is here", other.span(section, "detect")),)
                help = "add a text by which the templates differ"
                sink.error("SAGE706", message, entry.span(section, "detect"), help, related)
