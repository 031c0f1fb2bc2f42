"""`LLM.chat` renders as transformers does: tools, variables, extra special tokens, parts, several conversations."""

from __future__ import annotations

import asyncio
import json

import pytest
import transformers

from sageLLM import LLM, AsyncLLM, SamplingParams
from sageLLM.runtime.errors import ChatTemplateError, PromptError, SamplingParamsError

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


def test_chat_of_asyncio(llm):
    async def ask():
        return await AsyncLLM(llm).chat(CHAT, PARAMS, tools=TOOLS)

    assert asyncio.run(ask()).prompt_token_ids == llm.chat(CHAT, PARAMS, tools=TOOLS).prompt_token_ids
