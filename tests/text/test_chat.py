"""`LLM.chat` renders as transformers does: tools, variables, extra special tokens, parts, several conversations."""

from __future__ import annotations

import asyncio
import json

import pytest
import transformers

from sageLLM import LLM, AsyncLLM, SamplingParams
from sageLLM.runtime.engine.chat import MAX_TEMPLATES, ChatPrompts
from sageLLM.runtime.errors import ChatTemplateError, PromptError, SamplingParamsError
from sageLLM.runtime.text.chat_template import _Child
from sageLLM.runtime.text.tokenizer import Tokenizer, TokenizerConfig

TEMPLATE = """{{ bos_token }}{{ image_token }}
{%- if tools %}[{% for t in tools %}{{ t | tojson }}{% endfor %}]{% endif %}
{%- for m in messages %}{{ m.role }}: {{ m.content }}
{%- for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}bot:{% if enable_thinking is defined and not enable_thinking %} /no{% endif %}{% endif %}
{%- for d in documents or [] %}{{ d.text }}{% endfor %}"""
CHAT = [{"role": "user", "content": "def add"}, {"role": "bot", "content": "ok"}, {"role": "user", "content": "a"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
PARAMS = SamplingParams(max_tokens=3, temperature=0)


@pytest.fixture(scope="module")
def folder(make_checkpoint, byte_level):
    folder = make_checkpoint("Llama", vocab_size=420)
    byte_level._backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "extra_special_tokens": {"image_token": "<image>"},
        "chat_template": [
            {"name": "default", "template": TEMPLATE},
            {"name": "tool_use", "template": "tool_use " + TEMPLATE},
        ],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return LLM(folder, dtype="float32")


@pytest.fixture(scope="module")
def reference(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def expected(reference, messages, **options):
    ids = reference.apply_chat_template(messages, **({"add_generation_prompt": True} | options))["input_ids"]
    return tuple(ids)


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"tools": TOOLS}, {"tools": TOOLS}),
        ({"tools": []}, {"tools": []}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"chat_template_kwargs": {"image_token": "a"}}, {"image_token": "a"}),
        ({"chat_template_kwargs": {"documents": [{"text": "b"}]}}, {"documents": [{"text": "b"}]}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
    ],
)
def test_options_reach_the_template(llm, reference, options, theirs):
    output = llm.chat(CHAT, PARAMS, **options)
    assert output.prompt_token_ids == expected(reference, CHAT, **theirs)
    assert output.prompt is not None and output.prompt.startswith("tool_use" if "tools" in options else "<|begin|>")
    assert len(output.outputs[0].token_ids) == 3


def test_several_conversations_return_a_list(llm):
    alone = [llm.chat(chat, PARAMS) for chat in (CHAT, CHAT[:1])]
    together = llm.chat([CHAT, CHAT[:1]], [PARAMS, PARAMS])
    assert [output.outputs[0].token_ids for output in together] == [output.outputs[0].token_ids for output in alone]
    assert len(llm.chat([CHAT], PARAMS)) == 1
    with pytest.raises(SamplingParamsError, match="got 1 for 2 prompts"):
        llm.chat([CHAT, CHAT], [PARAMS])


def test_parts_of_a_text_are_joined(llm):
    parts = [{"role": "user", "content": [{"type": "text", "text": "def"}, {"type": "text", "text": "add"}]}]
    joined = [{"role": "user", "content": "def\nadd"}]
    assert llm.chat(parts, PARAMS).prompt_token_ids == llm.chat(joined, PARAMS).prompt_token_ids


def test_tool_calls_of_openai_render_as_objects(llm, reference):
    def conversation(arguments):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        return [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "sun"}]

    output = llm.chat(conversation('{"where": "Köln"}'), PARAMS)
    assert output.prompt_token_ids == expected(reference, conversation({"where": "Köln"}))


def test_nothing_runs_after_an_error(llm):
    with pytest.raises(PromptError, match=r"messages\[1\]\[0\].role must be a text"):
        llm.chat([CHAT, [{"content": "a"}]], PARAMS)
    with pytest.raises(ChatTemplateError, match="the chat messages must be JSON"):
        llm.chat(CHAT, PARAMS, chat_template_kwargs={"x": object()})
    assert not llm.engine.has_work


PARTS = [{"type": "text", "text": "x"}, {"type": "text", "text": "def add  "}]
LOOPS_OVER_PARTS = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"


@pytest.mark.parametrize("content", ["def add", "def add  ", "  ", "a[b] </s>", PARTS])
@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}",
        LOOPS_OVER_PARTS,
    ],
    ids=["checkpoint", "trim", "parts"],
)
def test_the_final_message_is_continued(llm, reference, template, content):
    if isinstance(content, list) != (template == LOOPS_OVER_PARTS):
        pytest.skip("the reference passes contents unchanged")
    chat = [*CHAT, {"role": "bot", "content": content}]
    if template == LOOPS_OVER_PARTS:
        chat = chat[-1:]
    options = {"add_generation_prompt": False, "continue_final_message": True, "chat_template": template}
    output = llm.chat(chat, PARAMS, **options)
    assert output.prompt_token_ids == expected(reference, chat, **options)
    assert len(output.outputs[0].token_ids) == 3
    assert chat[-1]["content"] == content  # the caller's messages are not changed


def test_a_template_that_renders_the_final_message_twice(llm):
    options = {"add_generation_prompt": False, "continue_final_message": True}
    template = "{{ messages[0].content }}|{{ messages[0].content | trim }}|{{ messages[0].content }}|end"
    output = llm.chat([{"role": "bot", "content": "a "}], PARAMS, chat_template=template, **options)
    assert output.prompt == "a |a |a "


@pytest.mark.parametrize(
    ("content", "options", "error", "message"),
    [
        ("a", {"add_generation_prompt": True}, PromptError, "cannot be combined with add_generation_prompt"),
        ("", {}, PromptError, r"messages\[0\].content must be a text for continue_final_message, got none"),
        (None, {}, PromptError, r"messages\[0\].content must be a text for continue_final_message, got none"),
        ([], {}, PromptError, r"messages\[0\].content must be a text for continue_final_message, got none"),
        ("a", {"chat_template": "{{ messages[0].role }}"}, ChatTemplateError, "leaves out the end of the last message"),
        ("a", {"chat_template": 7}, PromptError, "chat_template must be a Jinja template as a text, got 7"),
    ],
)
def test_what_cannot_be_continued(llm, content, options, error, message):
    options = {"add_generation_prompt": False, "continue_final_message": True} | options
    with pytest.raises(error, match=message):
        llm.chat([{"role": "bot", "content": content}], PARAMS, **options)


def test_a_template_of_the_caller(llm, reference):
    template = "{{ bos_token }}{{ messages[0].content }}{% if tools %}tools{% endif %}"
    output = llm.chat(CHAT, PARAMS, chat_template=template, tools=TOOLS)
    assert output.prompt_token_ids == expected(reference, CHAT, chat_template=template, tools=TOOLS)


def test_the_processes_of_templates_are_bounded(llm, monkeypatch):
    running = []
    start, stop = _Child.start, _Child.stop
    monkeypatch.setattr(_Child, "start", lambda *args: running.append(start(*args)) or running[-1])
    monkeypatch.setattr(_Child, "stop", lambda child: (child in running and running.remove(child)) or stop(child))
    templates = ["{{ messages[0].content }}" + " " * i for i in range(MAX_TEMPLATES + 2)]
    for template in [*templates, *templates]:
        assert llm.chat(CHAT, PARAMS, chat_template=template).prompt == "def add" + template[25:]
        assert len(running) <= MAX_TEMPLATES


def test_a_checkpoint_without_a_template(byte_level):
    tokenizer = Tokenizer(byte_level._backend, TokenizerConfig({}, {"tool_use": "{{ eos_token }}"}, frozenset()))
    with pytest.raises(ChatTemplateError) as caught:
        ChatPrompts(tokenizer).render(CHAT)
    assert str(caught.value) == (
        "expected a chat template 'default' in the checkpoint, got tool_use; "
        "pass a plain prompt or chat_template, or add chat_template.jinja to the checkpoint"
    )


def test_chat_of_asyncio(llm):
    async def ask():
        return await AsyncLLM(llm).chat(CHAT, PARAMS, tools=TOOLS)

    assert asyncio.run(ask()).prompt_token_ids == llm.chat(CHAT, PARAMS, tools=TOOLS).prompt_token_ids
