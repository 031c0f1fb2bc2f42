"""Emits one `Dialect` constant per dialect file, with a page and a test, and the table of all.

HERMES = Dialect(
    name="hermes",
    calls=Calls(forms=(Form(call=("<tool_call>\\n", Hole.OBJECT, "\\n</tool_call>"), separator="\\n"),), ...),
)
"""

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sageLLM.codegen.emit.docs import page
from sageLLM.codegen.emit.op_tests import BASE
from sageLLM.codegen.model.dialect import DialectDef, Element, FormDef
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header
from sageLLM.codegen.schema.dialects import CallsSpec, DialectFile, ExampleSpec

Fields = Sequence[tuple[str, Any]]
PIECE_LEN = 100


@dataclass(frozen=True, slots=True)
class PatternView:
    """A pattern, `call` or `each`, and the fields next to it that differ from their defaults."""

    call: tuple[Element, ...] = ()
    each: tuple[Element, ...] = ()
    rest: Fields = ()


@dataclass(frozen=True, slots=True)
class KeysView:
    """Keys of a call; `rest` has the key of the id, if there is one."""

    name: str
    arguments: str
    rest: Fields


@dataclass(frozen=True, slots=True)
class CallsView:
    """Sections that may be absent are lists of at most one item."""

    detect: Sequence[str]
    forms: Sequence[PatternView]
    keys: Sequence[KeysView]
    arguments: Sequence[PatternView]
    ids: str


@dataclass(frozen=True, slots=True)
class ReasoningView:
    """Blocks of reasoning with their marks; `rest` has the text that follows, if there is one."""

    detect: Sequence[str]
    open: str
    close: str
    rest: Fields


@dataclass(frozen=True, slots=True)
class ExampleView:
    """Texts in pieces that fit a line, and the other fields."""

    texts: Sequence[tuple[str, Sequence[str]]]
    rest: Fields


@dataclass(frozen=True, slots=True)
class DialectView:
    """Sections that may be absent are lists of at most one item."""

    summary: str
    source: Sequence[str]
    aliases: Sequence[str]
    skip: Sequence[str]
    calls: Sequence[CallsView] = field(default=())
    reasoning: Sequence[ReasoningView] = field(default=())


def emit_dialects(specs: Specs, renderer: Renderer) -> list[Output]:
    """`dialects/NAME.py`, `docs/dialects/NAME.md` and `tests/test_dialect_NAME.py` of each dialect, and DIALECTS."""
    own = [dialect for dialect in specs.dialects.values() if not specs.raw.is_base(dialect.entry)]
    made = [output for dialect in own for output in _of_dialect(dialect, specs, renderer)]
    text = renderer.render("dialect_registry.py.jinja", names=[dialect.name for dialect in own])
    table = Output("dialects/__init__.py", header("specs/dialects", "hermes") + text)
    return [*made, table, *_checks(specs, renderer)]


def _of_dialect(dialect: DialectDef, specs: Specs, renderer: Renderer) -> list[Output]:
    entry, name = dialect.entry, dialect.name
    head, refs = header(entry.doc.file, name), (entry.ref,)
    module = renderer.render("dialect.py.jinja", entry=entry, dialect=_view(dialect))
    examples = [_example_view(example) for example in entry.spec.examples]
    base = f"{BASE}.tests" if specs.is_overlay else ""
    tests = renderer.render("dialect_tests.py.jinja", entry=entry, examples=examples, base=base)
    return [
        Output(f"dialects/{name}.py", head + module, refs),
        Output(f"tests/test_dialect_{name}.py", head + tests, refs),
        page(f"docs/dialects/{name}.md", f"Dialect: {name}", entry.doc.file, [dialect_section(entry.spec)], refs),
    ]


def _checks(specs: Specs, renderer: Renderer) -> list[Output]:
    """The checks that the tests share; an overlay uses the package's."""
    if specs.is_overlay:
        return []
    text = header("specs/dialects", "hermes") + renderer.render("dialect_checks.py.jinja")
    return [Output("tests/dialect_checks.py", text)]


# modules


def _view(dialect: DialectDef) -> DialectView:
    spec = dialect.entry.spec
    found = spec.reasoning
    blocks = [(found.detect, *dialect.block, _given([("then", found.then)]))] if found and dialect.block else []
    return DialectView(
        summary=spec.summary,
        source=textwrap.wrap(f"source: {spec.source}", width=110),
        aliases=spec.aliases,
        skip=spec.skip,
        calls=[_calls_view(dialect, spec.calls)] if spec.calls else [],
        reasoning=[ReasoningView(*block) for block in blocks],
    )


def _calls_view(dialect: DialectDef, calls: CallsSpec) -> CallsView:
    keys, arguments = calls.keys, calls.arguments
    return CallsView(
        detect=calls.detect,
        forms=[PatternView(call=form.call, rest=_form_fields(form)) for form in dialect.forms],
        keys=[KeysView(keys.name, keys.arguments, _given([("id", keys.id)]))] if keys else [],
        arguments=[PatternView(each=dialect.each, rest=_given([("separator", arguments.separator)]))]
        if arguments
        else [],
        ids=calls.ids,
    )


def _form_fields(form: FormDef) -> Fields:
    names = ("open", "separator", "close", "at_start")
    return _given((name, getattr(form, name)) for name in names)


def _given(pairs: Iterable[tuple[str, Any]]) -> Fields:
    """The fields that differ from their defaults."""
    return [(name, value) for name, value in pairs if value]


# tests and pages


def _example(example: ExampleSpec) -> Mapping[str, Any]:
    calls = [call.model_dump(exclude_none=True) for call in example.calls]
    values = example.model_dump() | {"calls": calls, "types": example.parameters}
    del values["parameters"]
    return {name: value for name, value in values.items() if value}


def _example_view(example: ExampleSpec) -> ExampleView:
    values = _example(example)
    texts = [(name, list(_pieces(value))) for name, value in values.items() if isinstance(value, str)]
    return ExampleView(texts, [(name, value) for name, value in values.items() if not isinstance(value, str)])


def _pieces(text: str) -> Iterator[str]:
    """Parts of a text of which each fits a line of code."""
    start = 0
    for end in range(len(text) + 1):
        if len(json.dumps(text[start : end + 1])) > PIECE_LEN or end == len(text):
            yield text[start:end]
            start = end


def dialect_section(spec: DialectFile) -> str:
    """Marks, forms and examples of a dialect."""
    names = ", ".join(f"`{name}`" for name in (spec.dialect, *spec.aliases))
    parts = [spec.summary, f"Source: {spec.source}.", f"Names in commands: {names}."]
    if spec.calls:
        parts += ["## Calls", _list(_calls_facts(spec.calls))]
    if spec.reasoning:
        facts = [("block", _shown(spec.reasoning.block)), ("detected by", _texts(spec.reasoning.detect))]
        parts += ["## Reasoning", _list(facts)]
    if spec.skip:
        parts += ["## Marks that are left out", _texts(spec.skip)]
    parts.append("## Examples")
    parts += [part for example in spec.examples for part in _example_parts(example)]
    return "\n\n".join(parts)


def _calls_facts(calls: CallsSpec) -> list[tuple[str, str]]:
    facts = [("detected by", _texts(calls.detect))]
    for form in calls.forms:
        words = [f"{name} {_shown(text)}" for name, text in form.model_dump().items() if text and name != "call"]
        facts.append(("call", ", ".join([_shown(form.call), *words])))
    if calls.keys:
        keys = calls.keys.model_dump(exclude_none=True).items()
        facts.append(("keys of `{object}`", ", ".join(f"{name} {_shown(key)}" for name, key in keys)))
    if calls.arguments:
        separator = calls.arguments.separator
        each = _shown(calls.arguments.each) + (f", separator {_shown(separator)}" if separator else "")
        facts.append(("each of `{arguments}`", each))
    return [*facts, ("new ids", _shown(calls.ids))]


def _list(facts: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in facts)


def _example_parts(example: ExampleSpec) -> list[str]:
    read = {name: value for name, value in _example(example).items() if name not in ("text", "types")}
    fence = "````"
    return [f"{fence}\n{example.text}\n{fence}", f"{fence}json\n{json.dumps(read, ensure_ascii=False)}\n{fence}"]


def _shown(text: str) -> str:
    """A text as code, with line breaks visible."""
    return f"`{text}`".replace("\n", "\\n") if "`" not in text else f"`` {text} ``".replace("\n", "\\n")


def _texts(texts: Sequence[str]) -> str:
    return ", ".join(map(_shown, texts))
