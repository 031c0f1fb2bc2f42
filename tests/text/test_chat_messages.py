"""Contents of chat messages in each form that templates read, and the exact message of each error."""

from __future__ import annotations

import pytest

from sageLLM.runtime.errors import ChatTemplateError, PromptError
from sageLLM.runtime.text.chat_messages import as_conversations, check_template_options, normalize
from sageLLM.runtime.text.chat_template import ChatTemplate

FORMS = {
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}": "text",
    "{% for m in messages %}{{ m['content'].split('x')[-1] | trim }}{% endfor %}": "text",
    "{% for m in messages %}{% for p in m.content.split('x') %}{{ p }}{% endfor %}{% endfor %}": "text",
    # Qwen 3: the type is tested, but a list would be dropped
    "{% for m in messages %}{% if m.content is string %}{% set c = m.content %}{% else %}{% set c = '' %}{% endif %}"
    "{{ c }}{% endfor %}": "text",
    "{% for m in messages %}{% for p in m['content'] %}{{ p.text }}{% endfor %}{% endfor %}": "parts",
    "{% for m in messages %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p }}{% endfor %}"
    "{% endfor %}": "parts",
    "{% for m in messages %}{{ m.content | map(attribute='text') | join }}{% endfor %}": "parts",
    "{% for m in messages %}{% set c = m.content %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{{ p.text }}"
    "{% endfor %}{% endif %}{% endfor %}": "any",
    # GLM: a macro
    "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for p in content %}{{ p.text }}"
    "{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}": "any",
}


@pytest.mark.parametrize("source", FORMS)
def test_the_contents_that_a_template_reads(source):
    template = ChatTemplate(source)
    assert template.content_form == FORMS[source]
    conversation = [{"role": "user", "content": "ab"}, {"role": "user", "content": [{"type": "text", "text": "cd"}]}]
    text = template.render(normalize(conversation, template.content_form))
    assert text.replace("user: ", "") in (
        "abcd",
        "[...]",
        "{'type': 'text', 'text': 'ab'}{'type': 'text', 'text': 'cd'}",
    )
    template.close()


def test_a_template_with_an_error_has_no_form():
    with pytest.raises(ChatTemplateError, match="the chat template failed with TemplateSyntaxError"):
        _ = ChatTemplate("{% if %}").content_form


TEXT = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("content", "text", "parts"),
    [
        ("a", "a", [TEXT]),
        (None, "", [{"type": "text", "text": ""}]),
        ([], "", []),
        ([TEXT, {"type": "input_text", "text": "b"}], "a\nb", [TEXT, {"type": "text", "text": "b"}]),
        (["a", {"type": "refusal", "refusal": "no"}], "a\nno", [TEXT, {"type": "text", "text": "no"}]),
        (({"text": "a"},), "a", [TEXT]),
    ],
)
def test_contents_in_each_form(content, text, parts):
    message = {"role": "user", "content": content, "name": "x"}
    assert normalize([message], "text") == [{"role": "user", "content": text, "name": "x"}]
    assert normalize([message], "parts") == [{"role": "user", "content": parts, "name": "x"}]
    given = text if content is None or isinstance(content, str) else parts
    assert normalize([message], "any") == [{"role": "user", "content": given, "name": "x"}]


def test_arguments_of_tool_calls_become_objects():
    def call(arguments):
        return {"id": "1", "function": {"name": "f", "arguments": arguments}}

    message = {"role": "assistant", "tool_calls": [call('{"x": [1]}'), call(""), call({"y": 2}), {"id": "2"}]}
    before = repr(message)
    (result,) = normalize([message], "text")
    assert result["tool_calls"] == [call({"x": [1]}), call({}), call({"y": 2}), {"id": "2"}]
    assert result["content"] == ""
    assert repr(message) == before


USER = {"role": "user", "content": "a"}
CONVERSATION = "messages must be a list of {'role', 'content'} objects, or a list of such lists, got "


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", CONVERSATION + "a str"),
        (USER, CONVERSATION + "a dict"),
        (None, CONVERSATION + "None"),
        ([], CONVERSATION + "an empty list"),
        ([[]], "messages[0] must have at least one message"),
        ([[USER], "x"], "messages[1] must be a list of {'role', 'content'} objects, got a str"),
        (["x"], "messages[0] must be a list of {'role', 'content'} objects, got a str"),
        ([USER, "x"], "messages[1] must be an object with role and content, got a str"),
        ([USER, {"content": "a"}], "messages[1].role must be a text, got None"),
        ([[USER], [{"role": 3}]], "messages[1][0].role must be a text, got an int"),
        ([{"role": "user", "content": 3}], "messages[0].content must be a text or a list of parts, got an int"),
        ([{"role": "user", "content": b"a"}], "messages[0].content must be a text or a list of parts, got a bytes"),
        (
            [{"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[1] must be a part of type 'text', got the type 'image_url'; only text is supported",
        ),
        (
            [{"role": "user", "content": [3]}],
            "messages[0].content[0] must be a part of type 'text', got an int; only text is supported",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text must be a text, got None"),
        ([{"role": "a", "tool_calls": "x"}], "messages[0].tool_calls must be a list, got a str"),
        ([{"role": "a", "tool_calls": ["x"]}], "messages[0].tool_calls[0] must be an object, got a str"),
        (
            [{"role": "a", "tool_calls": [{"function": {"arguments": "[1]"}}]}],
            "messages[0].tool_calls[0].function.arguments must be a JSON object, got a list",
        ),
        (
            [{"role": "a", "tool_calls": [{"function": {"arguments": "{"}}]}],
            "messages[0].tool_calls[0].function.arguments must be JSON: "
            "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
    ],
)
def test_errors_name_the_place(messages, message):
    with pytest.raises(PromptError) as caught:
        conversations, is_batch = as_conversations(messages)
        for i, conversation in enumerate(conversations):
            normalize(conversation, "text", f"messages[{i}]" if is_batch else "messages")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("tools", "variables", "message"),
    [
        ("x", None, "tools must be a list of objects, got a str"),
        ({"type": "function"}, None, "tools must be a list of objects, got a dict"),
        ([{}, print], None, "tools[1] must be an object such as a JSON schema, got a builtin_function_or_method"),
        (None, [1], "chat_template_kwargs must map names to values, got a list"),
        (None, {1: 2}, "chat_template_kwargs must map names to values, got a dict"),
        (None, {"messages": []}, "chat_template_kwargs must not contain 'messages', which chat sets itself"),
    ],
)
def test_errors_of_options(tools, variables, message):
    with pytest.raises(PromptError) as caught:
        check_template_options(tools, variables)
    assert str(caught.value) == message
