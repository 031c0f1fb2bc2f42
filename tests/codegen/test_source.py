"""The YAML loader: values, their locations, and the diagnostics of refused files."""

import pytest

from sageLLM.codegen.diagnostics import SpecErrors, render
from sageLLM.codegen.source import parse_document

TEXT = """\
schema: ops/v1
plain: [1, -2, 2.5, 1e-6, 1.0e+3, true, false, null, ~]
words: [off, yes, 010, 12:30:00, 2026-13-45, .inf, 0x10, 1_000, 'true']
compute: |
  xf = f32(x)

  y = E(xf)
"""


def test_scalars_mean_what_they_say() -> None:
    data = parse_document(TEXT, display="s.yaml").data
    assert data["plain"] == [1, -2, 2.5, 1e-6, 1000.0, True, False, None, None]
    assert data["words"] == ["off", "yes", "010", "12:30:00", "2026-13-45", ".inf", "0x10", "1_000", "true"]


@pytest.mark.parametrize(
    ("path", "offset", "place"),
    [
        (("compute",), 0, "5:3"),
        (("compute",), TEXT.index("f32") - TEXT.index("xf ="), "5:8"),
        (("compute",), len("xf = f32(x)\n\ny = "), "7:7"),
        (("words", 0), 1, "3:10"),
        (("words", 8), 2, "3:68"),
    ],
)
def test_every_character_has_its_place(path: tuple[str | int, ...], offset: int, place: str) -> None:
    assert str(parse_document(TEXT, display="s.yaml").text_span(path, offset)) == f"s.yaml:{place}"


REFUSED = {
    "a: 1\nb: 2\na: 3": "s.yaml:3:1: error[SAGE006]: duplicate key 'a'",
    "a: &x 1": "s.yaml:1:4: error[SAGE005]: anchors and aliases are not allowed",
    "a: *x": "s.yaml:1:4: error[SAGE005]: anchors and aliases are not allowed",
    "a: !!python/object:os.system {}": (
        "s.yaml:1:4: error[SAGE005]: the tag 'tag:yaml.org,2002:python/object:os.system' is not allowed"
    ),
    "[a]: 1": "s.yaml:1:1: error[SAGE007]: a key must be plain text",
    "a: 1\n---\nb: 2": "s.yaml:2:1: error[SAGE004]: a spec file must be one document",
    "": "s.yaml:1:1: error[SAGE004]: the file is empty",
    "a: " + "9" * 19: "s.yaml:1:4: error[SAGE008]: an integer must have at most 18 digits",
    "a: 1e999": "s.yaml:1:4: error[SAGE008]: a number must fit a 64-bit float",
    "[" * 100_000: "s.yaml:1:66: error[SAGE003]: values must be nested at most 64 levels deep",
    'a: "\\uD800"': "s.yaml:1:7: error[SAGE001]: not valid YAML: found invalid Unicode character escape code",
    "a: [1": "s.yaml:1:6: error[SAGE001]: not valid YAML: did not find expected ',' or ']'",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_the_rest_is_refused_by_name(text: str) -> None:
    with pytest.raises(SpecErrors) as caught:
        parse_document(text, display="s.yaml")
    assert str(caught.value) == REFUSED[text]


def test_a_finding_shows_the_line_the_caret_and_the_remedy() -> None:
    text = "a: 1\n\tb: 2\nlong_key: 3\nlong_key: 4"
    with pytest.raises(SpecErrors) as caught:
        parse_document(text.replace("\t", ""), display="s.yaml")
    lines = text.replace("\t", "").split("\n")
    assert render(caught.value.diagnostics[0], lambda file, line: lines[line - 1]) == (
        "s.yaml:4:1: error[SAGE006]: duplicate key 'long_key'\n"
        "    4 | long_key: 4\n"
        "      | ^^^^^^^^\n"
        "   note: first defined here: s.yaml:3:1\n"
        "    3 | long_key: 3\n"
        "      | ^^^^^^^^\n"
        "   = help: keep one"
    )


def test_no_control_character_reaches_the_terminal() -> None:
    text = "a: 1\n\u202eb: [\u202e}"
    with pytest.raises(SpecErrors) as caught:
        parse_document(text, display="s.yaml")
    shown = render(caught.value.diagnostics[0], lambda file, line: text.split("\n")[line - 1])
    assert "\u202e" not in shown
