"""LiteLLM as a gateway to the server: chats, streams, tools, structured output and text completions.

python with_litellm.py URL
"""

import json
import sys

import litellm

URL = f"{sys.argv[1]}/v1"
CHAT = {"model": "hosted_vllm/tiny", "api_base": URL, "api_key": "none", "max_tokens": 64, "temperature": 0}
USER = [{"role": "user", "content": "def main("}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "decide", "description": "Decides.", "parameters": SCHEMA}}

whole = litellm.completion(messages=USER, **CHAT)
assert whole.choices[0].message.content and whole.usage.completion_tokens > 0
parts = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(messages=USER, stream=True, **CHAT)]
assert "".join(parts) == whole.choices[0].message.content
print("chat, stream")

form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
found = litellm.completion(messages=USER, response_format=form, **{**CHAT, "max_tokens": 200})
assert json.loads(found.choices[0].message.content).keys() == {"ok"}
print("structured output")

found = litellm.completion(messages=USER, tools=[TOOL], tool_choice="required", **{**CHAT, "max_tokens": 200})
[call, *_] = found.choices[0].message.tool_calls
assert call.function.name == "decide" and json.loads(call.function.arguments).keys() == {"ok"}
print("forced tool call")

found = litellm.text_completion(
    model="text-completion-openai/tiny", api_base=URL, api_key="none", prompt="def main(", max_tokens=8
)
assert found.choices[0].text
print("text completion")
