"""Chat templates: realistic ones render as in transformers, hostile ones are bounded and rejected with a message."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from sageLLM.runtime.errors import ChatTemplateError
from sageLLM.runtime.text.chat_template import ChatTemplate, TemplateLimits

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA_STYLE = """{{ bos_token }}
{% if messages[0].role == 'system' %}
    {% set system = messages[0].content | trim %}
    {% set messages = messages[1:] %}
{% else %}
    {% set system = '' %}
{% endif %}
{% for message in messages %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user/assistant') }}
    {% endif %}
    {% if message.role == 'user' %}
        {{ '[INST] ' + (system + '\n\n' if loop.first and system else '') + message.content + ' [/INST]' }}
    {% else %}
        {{ ' ' ~ message.content | trim ~ eos_token }}
    {% endif %}
{% endfor %}"""

TOOLS = """
{%- if tools %}
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>{{ tools | tojson(indent=2) }}
{%- endif %}
{%- macro show(message) -%}
{%- set content = message.content -%}
<{{ message.role }}>{{ content if content is string else content | map(attribute='text') | join(' | ') }}
{%- endmacro -%}
{%- for message in messages %}
{{ show(message) }}
{%- for call in message.tool_calls | default([]) %}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson(sort_keys=true) }}}
{%- endfor %}
{%- endfor %}
"""

NAMESPACE_AND_CONTROLS = """
{%- set ns = namespace(last=-1, text='') %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {%- set ns.last = loop.index0 %}
    {%- set ns.text = ns.text + message.content.split('</think>')[-1].lstrip('\\n') + '|' %}
{%- endfor %}
{{- ns.text }}{{ ns.last }}{{ '/no_think' if enable_thinking is defined and enable_thinking is false }}
{% generation %}{{ messages[-1].content }}{% endgeneration %}
{{- dict(a=1).items() | list }}{{ messages | length }}{{ strftime_now('%%') }}
"""

CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Was heißt <b>你好</b> & 'hi'?"},
    {"role": "assistant", "content": "<think>hm</think>\n\nHello "},
    {"role": "user", "content": "Thanks 👩‍👩‍👧"},
]
WITH_TOOLS = [
    {"role": "user", "content": [{"type": "text", "text": "Weather?"}, {"type": "text", "text": "Now"}]},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"where": "Köln", "days": 3}}}],
    },
    {"role": "tool", "content": "<sun>"},
]
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("source", "messages", "tools"),
    [
        (CHATML, CHAT, None),
        (LLAMA_STYLE, CHAT, None),
        (LLAMA_STYLE, CHAT[1:], None),
        (TOOLS, WITH_TOOLS, WEATHER),
        (TOOLS, CHAT, None),
        (NAMESPACE_AND_CONTROLS, CHAT, None),
    ],
)
def test_equal_to_transformers(source, messages, tools):
    template = ChatTemplate(source, SPECIAL)
    for add_prompt in (True, False):
        ours = template.render(
            messages, tools=tools, add_generation_prompt=add_prompt, variables={"enable_thinking": False}
        )
        theirs, _ = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=source,
            add_generation_prompt=add_prompt,
            enable_thinking=False,
            **SPECIAL,
        )
        assert ours == theirs[0]
    template.close()


def refusal(source, messages=(), **limits) -> str:
    template = ChatTemplate(source, SPECIAL, TemplateLimits(**limits))
    with pytest.raises(ChatTemplateError) as caught:
        template.render(messages)
    template.close()
    return str(caught.value)


TOO_LONG = "the chat template wrote more than 1000 characters"
TOO_LATE = "the chat template took longer than 0.5 s"
TOO_LARGE = "the chat template requires more than 256 MiB of memory"
GROWING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
LOOPS = "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"
TREE = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
UNSAFE = "the chat template failed with SecurityError: "

HOSTILE = [
    ("{{ messages[0] * 10**5 }}", TOO_LONG),
    ("{% for i in range(2000) %}x{% endfor %}", TOO_LONG),
    ("{{ 'a' | center(5000) }}", TOO_LONG),
    ("{{ 'a' * 10**9 }}", TOO_LARGE),
    ("{{ '%1000000000d' | format(1) }}", TOO_LARGE),
    ("{{ '{:>1000000000}'.format(1) }}", TOO_LARGE),
    (GROWING, TOO_LARGE),
    (LOOPS, TOO_LATE),
    (CALLS, TOO_LATE),
    ("{{ 9 ** (9 ** 9) }}", TOO_LATE),
    ("{{ ''.__class__.__mro__ }}", UNSAFE + "access to attribute '__class__' of 'str' object is unsafe."),
    ("{{ messages.append(1) }}", UNSAFE + "access to attribute 'append' of 'list' object is unsafe."),
    (
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        UNSAFE + "a chat template may not set the attribute '__class__'",
    ),
    (
        "{{ cycler.__init__.__globals__ }}",
        UNSAFE + "access to attribute '__init__' of 'type' object is unsafe.",
    ),
    (
        "{{ raise_exception.__globals__.os }}",
        UNSAFE + "access to attribute '__globals__' of 'function' object is unsafe.",
    ),
    (
        "{% include '/etc/passwd' %}",
        "the chat template failed with TypeError: no loader for this environment specified",
    ),
    (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "the chat template failed with RecursionError: maximum recursion depth exceeded",
    ),
    (
        "\n{% if %}",
        "the chat template failed with TemplateSyntaxError: "
        "Expected an expression, got 'end of statement block' (line 2)",
    ),
    ("{{ nothing.there }}", "the chat template failed with UndefinedError: 'nothing' is undefined"),
    ("{{ raise_exception('only users') }}", "the chat template rejects these messages: only users"),
    ("{{ range(10**6) }}", None),
    (TREE, None),
]


@pytest.mark.parametrize(("source", "message"), HOSTILE)
def test_a_hostile_template_is_rejected(source, message):
    seconds = 0.5 if message in (TOO_LATE, None) else 60.0  # a slow machine must meet the limit under test first
    text = refusal(source, ["ab"], max_chars=1000, max_bytes=256 * 2**20, seconds=seconds)
    if message is None:  # the machine decides which limit comes first
        assert text.startswith(
            ("the chat template took", "the chat template requires", "the chat template failed with Ov")
        )
    else:
        assert text.removesuffix(" while calling a Python object").removesuffix(" in comparison") == message


def test_the_template_still_works_after_an_error_and_after_a_kill():
    source = "{% if messages[0] == 'bad' %}{{ raise_exception('no') }}{% elif messages[0] == 'slow' %}"
    source += LOOPS + "{% endif %}{{ messages[0] }}"
    template = ChatTemplate(source, limits=TemplateLimits(seconds=1.0))
    for _ in range(2):
        for messages, expected in ((["bad"], "rejects these messages: no"), (["slow"], "took longer than 1 s")):
            with pytest.raises(ChatTemplateError, match=expected):
                template.render(messages)
            assert template.render(["fine"]) == "fine"
    template.close()
    assert template.render(["closed"]) == "closed"
    template.close()


def test_threads_share_a_template():
    template = ChatTemplate("{{ messages[0] }}")
    results: dict[int, str] = {}

    def work(i: int) -> None:
        results[i] = template.render([f"m{i}"])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    template.close()
    assert results == {i: f"m{i}" for i in range(16)}


def test_renderings_are_independent():
    template = ChatTemplate("{{ leak is defined }}{% set leak = 1 %}")
    assert [template.render([], variables={"leak": 1}), template.render([])] == ["True", "False"]
    template.close()


def test_the_child_gets_no_secrets_of_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "x")
    template = ChatTemplate("{{ messages }}")
    template.render([])
    process = template._child._process
    environment = Path(f"/proc/{process.pid}/environ")
    if environment.exists():
        assert b"SECRET_KEY" not in environment.read_bytes()
    template.close()
    assert process.poll() is not None


def test_messages_that_are_not_json():
    assert refusal("", [{"content": {1, 2}}]) == (
        "the chat messages must be JSON: Object of type set is not JSON serializable"
    )
    assert refusal("", [float("nan")]).startswith("the chat messages must be JSON: Out of range float values")


def test_half_a_surrogate_passes_through_to_the_tokenizer():
    template = ChatTemplate("{{ messages[0] }}")
    assert template.render(["a\ud800"]) == "a\ud800"
    template.close()


def test_a_template_that_is_too_long():
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate(" " * (2**20 + 1))
    assert str(caught.value) == "the chat template must have at most 1048576 characters, got 1048577"
