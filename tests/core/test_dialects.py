"""Dialects: the result of parsing is independent of the division of the text, calls are read back, nothing is lost."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.generated.dialects import DIALECTS
from sageLLM.generated.tests.dialect_checks import read
from sageLLM.runtime.core.dialects.call_reader import divided
from sageLLM.runtime.core.dialects.events import CallArguments, CallStart, Content, Event, Thought
from sageLLM.runtime.core.dialects.json_scanner import JsonScanner
from sageLLM.runtime.core.dialects.literals import json_of_text, python_value
from sageLLM.runtime.core.dialects.model import Calls, Dialect, Hole
from sageLLM.runtime.core.dialects.parser import DialectParser
from sageLLM.runtime.core.dialects.writer import WrittenCall, python_text, write_calls

WITH_CALLS = [dialect for dialect in DIALECTS.values() if dialect.calls is not None]
TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["<", "</", "\n", " x ", '"}', "{}", "\\", "```", "</tool_call>", "\u2028", "<|", "[", "é🎉", "True", "12", "null"]
)
scalars = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | texts
scalars |= st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
keys = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
names = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True)
calls_to_write = st.lists(
    st.builds(WrittenCall, names, st.dictionaries(keys, values, max_size=3)), min_size=1, max_size=3
)


def tools_of(items: Sequence[WrittenCall]) -> dict[str, dict[str, Any]]:
    """Schemas that tell the types of all arguments; a function that is called twice may have two types of one name."""
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        properties = found.setdefault(item.name, {"properties": {}})["properties"]
        for key, value in item.arguments.items():
            kinds = properties.setdefault(key, {"anyOf": []})["anyOf"]
            kinds.append({"type": TYPES.get(type(value), "null")})
    return found


def is_ambiguous(calls: Calls, items: Sequence[WrittenCall]) -> bool:
    """Whether a text as it is contains the mark that ends it, or stands for two types."""
    if calls.arguments is None or Hole.VALUE not in calls.arguments.each:
        return False
    mark = divided(calls.arguments.each)[2].strip()
    types: dict[tuple[str, str], set[str]] = {}
    for item in items:
        for key, value in item.arguments.items():
            types.setdefault((item.name, key), set()).add(type(value).__name__)
            if isinstance(value, str) and mark in value + mark[:-1]:
                return True
    return any(len(kinds) > 1 for kinds in types.values())


def parsed_calls(events: Sequence[Event]) -> list[tuple[str, Any]]:
    found = []
    for start in (event for event in events if isinstance(event, CallStart)):
        pieces = [event.text for event in events if isinstance(event, CallArguments) and event.index == start.index]
        found.append((start.name, json.loads("".join(pieces))))
    return found


@settings(max_examples=200)
@given(st.sampled_from(WITH_CALLS), calls_to_write, st.data())
def test_written_calls_are_read_back(dialect: Dialect, items: list[WrittenCall], data: st.DataObject) -> None:
    assert dialect.calls is not None
    if is_ambiguous(dialect.calls, items):
        return
    text, tools = write_calls(dialect.calls, items), tools_of(items)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    events = read(DialectParser.of(dialect, tools=tools), pieces)
    assert parsed_calls(events) == [(item.name, dict(item.arguments)) for item in items]
    assert not any(isinstance(event, Content) and event.text.strip() for event in events)


def marks_of(dialect: Dialect) -> list[str]:
    """The literals of a dialect, whole and cut."""
    found = list(dialect.skip)
    if dialect.reasoning is not None:
        found += [dialect.reasoning.open, dialect.reasoning.close]
    for form in dialect.calls.forms if dialect.calls else ():
        found += [form.open, form.separator, form.close, *(part for part in form.call if isinstance(part, str))]
    if dialect.calls is not None and dialect.calls.arguments is not None:
        found += [part for part in dialect.calls.arguments.each if isinstance(part, str)]
    return [mark for mark in found if mark] + [mark[:-1] for mark in found if len(mark) > 2]


@settings(max_examples=300)
@given(st.sampled_from(list(DIALECTS.values())), st.booleans(), st.data())
def test_any_text_is_read_the_same_in_every_division(dialect: Dialect, opened: bool, data: st.DataObject) -> None:
    """Texts of marks, beginnings of marks, JSON and words. All words are in the result, in their order."""
    marks = st.sampled_from([*marks_of(dialect), '{"name": "', '", "arguments": ', '"a": ', "{", "}", ", ", "\n", " "])
    numbered = data.draw(st.lists(marks | st.just("w"), max_size=24))
    text = "".join(f"w{i}w" if part == "w" else part for i, part in enumerate(numbered))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))

    def parser() -> DialectParser:
        return DialectParser.of(dialect, in_reasoning=opened, make_id=lambda calls, name, index: str(index))

    whole = read(parser(), [text])
    assert read(parser(), list(text)) == whole
    assert read(parser(), [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == whole
    shown = "".join(event.name if isinstance(event, CallStart) else event.text for event in whole)
    assert re.findall(r"w\d+w", shown) == re.findall(r"w\d+w", text)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
def test_text_without_marks_is_content(dialect: Dialect) -> None:
    for text in ("", " ", "\n\nHello, world.\n ", "a < b && c > d [0] {1} \\ `x`\n", "é🎉\u2028 <b>"):
        assert (
            "".join(event.text for event in read(DialectParser.of(dialect), [text]) if isinstance(event, Content))
            == text
        )


def test_the_time_is_linear_in_hostile_texts() -> None:
    """Calls that begin again and again, deep nesting, and long arguments; by the number of steps, not by the clock."""
    hermes = DIALECTS["hermes"]
    for text in ('<tool_call>\n{"x": ' * 4000, "<tool_call>{" + '"a": [' * 9000, "[" * 50_000, "<" * 50_000):
        events = DialectParser.of(hermes).parse(text)
        assert "".join(event.text for event in events if isinstance(event, Content)) == text
    pythonic = DialectParser.of(DIALECTS["pythonic"], tools={"f": {}})
    events = pythonic.parse("[f(a=" + "-" * 20_000 + "1)]")
    assert [type(event) for event in events] == [CallStart, CallArguments, Content]


# values


@given(values, st.booleans())
def test_the_scanner_finds_the_end_of_a_value(value: object, is_ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii)
    for pieces in ([text, " ,"], [*text, ","]):
        scanner, parts = JsonScanner(), []
        for piece in pieces:
            if scanner.is_done:
                break
            parts.append(scanner.scan(piece)[0])
        assert scanner.is_done and json.loads("".join(parts)) == value


@given(values, st.data())
def test_the_scanner_accepts_what_json_accepts(value: object, data: st.DataObject) -> None:
    """Texts with an edit. Control characters in strings are accepted, and repaired."""
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text)))
    edited = (
        text[:at]
        + data.draw(st.sampled_from(['"', "\\", "{", "]", ",", ":", "1", "-", "\n", "\t", "u", "e"]))
        + text[at:]
    )
    scanner = JsonScanner()
    found, _ = scanner.scan(edited)
    found += scanner.finish() if not scanner.is_done and not scanner.has_failed else ""
    try:
        wanted, _ = json.JSONDecoder(strict=False, parse_constant=_refuse).raw_decode(edited.lstrip())
    except ValueError:
        assert not scanner.is_done
        return
    if scanner.is_done:
        assert json.loads(found) == wanted
    else:  # the decoder ends a number or literal where a longer word does not fit
        assert edited.lstrip()[0] in "-0123456789tfn"


def _refuse(word: str) -> None:
    raise ValueError(word)


@given(values)
def test_python_literals_have_their_values(value: object) -> None:
    assert python_value(python_text(value)) == value
    assert python_value(repr(value)) == value


@pytest.mark.parametrize(
    "text", ["f()", "{1: 2}", "b'x'", "1j", "x", "[*a]", "{**a}", "1e999", "lambda: 0", "f'{x}'", ""]
)
def test_other_expressions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a Python literal"):
        python_value(text)


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("12", {"type": "string"}, "12"),
        ("12", {"type": "integer"}, 12),
        ("12", {"type": ["string", "null"]}, "12"),
        ("null", {"type": ["string", "null"]}, None),
        ("[1, 2]", {"anyOf": [{"type": "array"}, {"type": "string"}]}, [1, 2]),
        ("True", {"type": "boolean"}, True),
        ("Paris", {}, "Paris"),
        ("12", {}, 12),
        ("NaN", {"type": "number"}, "NaN"),
        ("b", {"enum": ["a", "b"]}, "b"),
        ("1", {"enum": ["1", "2"]}, "1"),
        ("x", "not a schema", "x"),
    ],
)
def test_texts_have_the_type_of_their_schema(text: str, schema: object, value: object) -> None:
    assert json.loads(json_of_text(text, schema)) == value


# announcements


def events_of(name: str, text: str, **options: Any) -> list[Event]:
    return DialectParser.of(DIALECTS[name], make_id=lambda calls, name, index: f"id{index}", **options).parse(text)


def test_arguments_are_streamed() -> None:
    parser = DialectParser.of(DIALECTS["hermes"], make_id=lambda calls, name, index: "id")
    assert parser.feed('<tool_call>\n{"name": "f", "argum') == []
    assert parser.feed('ents": {"a": "x') == [CallStart(0, "id", "f"), CallArguments(0, '{"a": "x')]
    assert parser.feed("y\\") == [CallArguments(0, "y")]
    assert parser.feed("u00e9") == [CallArguments(0, "\\u00e9")]
    assert parser.feed('", "b": 1') == [CallArguments(0, '", "b": ')]
    assert parser.feed("2}}") == [CallArguments(0, "12}")]
    assert parser.finish() == []


def test_texts_of_tags_are_streamed_and_other_values_held() -> None:
    tools = {"f": {"properties": {"a": {"type": "string"}, "b": {"type": "array"}}}}
    parser = DialectParser.of(DIALECTS["qwen3_coder"], tools=tools, make_id=lambda calls, name, index: "id")
    parser.feed("<tool_call>\n<function=f>\n<parameter=a>\n")
    assert parser.feed('one "two" \n') == [CallArguments(0, 'one \\"two\\"')]
    assert parser.feed("</parameter>\n<parameter=b>\n[1,") == [CallArguments(0, ' ", "b": ')]
    assert parser.feed(" 2]\n</parameter>\n</function>\n") == [CallArguments(0, "[1, 2]}")]


def test_marks_inside_json_values_of_tags() -> None:
    body = '["</parameter>", {"a": "\\n</parameter>"}]'
    values = f"<parameter=x>\n{body}\n</parameter>\n<parameter=y>\n[x\n</parameter>\n"
    found = events_of("qwen3_coder", f"<tool_call>\n<function=f>\n{values}</function>\n</tool_call>")
    assert parsed_calls(found) == [("f", {"x": json.loads(body), "y": "[x"})]


def test_a_call_that_breaks_off_keeps_its_beginning_and_the_rest_is_content() -> None:
    found = events_of("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1, oops}}</tool_call>')
    assert found == [
        CallStart(0, "id0", "f"),
        CallArguments(0, '{"a": 1, '),
        Content("oops}}</tool_call>"),
    ]


def test_keys_of_a_call_in_any_order() -> None:
    """Arguments before the name are held until it is known; a second time they are no arguments."""
    parser = DialectParser.of(DIALECTS["hermes"])
    events = parser.parse('<tool_call>{"arguments": {"a": [1]}, "name": "f"}</tool_call>')
    assert parsed_calls(events) == [("f", {"a": [1]})] and len(events) == 2
    twice = '{"name": "f", "arguments": {}, "arguments": {"a": 1}}'
    events = DialectParser.of(DIALECTS["hermes"]).parse(f"<tool_call>{twice}</tool_call>")
    assert parsed_calls(events) == [("f", {})]
    assert events[-1] == Content('{"a": 1}}</tool_call>')


def test_a_form_of_the_beginning_is_content_elsewhere() -> None:
    calls, text = DIALECTS["llama3_json"].calls, '{"name": "f", "parameters": {}}'
    assert parsed_calls(DialectParser(calls, tools={"f": {}}).parse(text)) == [("f", {})]
    assert DialectParser(calls, tools={"f": {}}).parse(f"So: {text}") == [Content(f"So: {text}")]


def test_an_answer_that_is_cut_has_an_incomplete_call() -> None:
    for cut, wanted in (('{"a": 12', '{"a": 12'), ('{"a": "x\\', '{"a": "x\\'), ("{", "{")):
        found = events_of("mistral", f"[TOOL_CALLS]f[ARGS]{cut}")
        assert found == [CallStart(0, "id0", "f"), CallArguments(0, wanted)]


def test_a_bare_object_is_a_call_of_a_known_function_only() -> None:
    text = '{"name": "Bob", "parameters": {"age": 5}}'
    assert events_of("llama3_json", text, tools={"f": {}}) == [Content(text)]
    assert events_of("llama3_json", text, tools={"Bob": {}})[0] == CallStart(0, "id0", "Bob")


def test_reasoning_of_one_dialect_and_calls_of_another() -> None:
    parser = DialectParser(
        DIALECTS["hermes"].calls, DIALECTS["think"].reasoning, make_id=lambda calls, name, index: "id"
    )
    text = '<think>\nUse <tool_call>\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
    assert parser.parse(text) == [Thought("Use <tool_call>"), CallStart(0, "id", "f"), CallArguments(0, "{}")]


def test_new_ids_have_the_form_of_the_dialect() -> None:
    for name, form in (
        ("hermes", r"chatcmpl-tool-[0-9a-f]{32}"),
        ("mistral", r"[A-Za-z0-9]{9}"),
        ("kimi_k2", r"functions\.f:0"),
    ):
        calls = DIALECTS[name].calls
        assert calls is not None
        [start, _] = DialectParser(calls).parse(write_calls(calls, [WrittenCall("f", {})]))
        assert isinstance(start, CallStart) and re.fullmatch(form, start.id)
