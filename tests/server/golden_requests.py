"""Requests of the golden recordings, and their recording from a running server.

    python tests/server/golden_requests.py --url http://127.0.0.1:8000 --out tests/server/golden/vllm.json

records the responses of any server of the bundled model, served as `tiny`. The committed file is of vLLM's server:

    python -m vllm.entrypoints.openai.api_server --model examples/tiny_python_model --served-model-name tiny \\
        --dtype float32 --enforce-eager --enable-prompt-tokens-details
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 12}
USER = [{"role": "user", "content": "def main("}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
USAGE = {"include_usage": True}
CONTINUOUS = {"include_usage": True, "continuous_usage_stats": True}


class Recorded(NamedTuple):
    """A request: its name, path, and body; None for a GET."""

    name: str
    path: str
    body: dict[str, Any] | None = None


def completion(name: str, prompt: Any = "def main(", **fields: Any) -> Recorded:
    return Recorded(f"completion {name}", "/v1/completions", {"prompt": prompt, **GREEDY, **fields})


def chat(name: str, messages: Any = USER, **fields: Any) -> Recorded:
    return Recorded(f"chat {name}", "/v1/chat/completions", {"messages": messages, **GREEDY, **fields})


REQUESTS = [
    Recorded("models", "/v1/models"),
    Recorded("version", "/version"),
    Recorded("tokenize", "/tokenize", {"model": "tiny", "prompt": "def main(self):"}),
    Recorded("tokenize strings", "/tokenize", {"model": "tiny", "prompt": "def main(", "return_token_strs": True}),
    Recorded("tokenize chat", "/tokenize", {"model": "tiny", "messages": USER}),
    Recorded("detokenize", "/detokenize", {"model": "tiny", "tokens": [300, 301, 302]}),
    completion("greedy"),
    completion("without max_tokens", max_tokens=None),
    completion("of two prompts", ["import os\n", "class A:"]),
    completion("of token ids", [300, 301, 302]),
    completion("of lists of token ids", [[300, 301], [302, 303, 304]]),
    completion("with logprobs", logprobs=2),
    completion("with echo", echo=True),
    completion("with echo and logprobs", echo=True, logprobs=1, max_tokens=1),
    completion("with prompt_logprobs", prompt_logprobs=1, max_tokens=2),
    completion("with a stop string", stop=["self"], max_tokens=24),
    completion("with a kept stop string", stop=["self"], include_stop_str_in_output=True, max_tokens=24),
    completion("with a stop id", stop_token_ids=[10], max_tokens=24),
    completion("with n", n=2, temperature=1.0, seed=1, ignore_eos=True),
    completion("with penalties", repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1),
    completion("with logit_bias", logit_bias={"300": 100}, max_tokens=4),
    completion("with token ids returned", return_token_ids=True),
    completion("by a regex", structured_outputs={"regex": "[0-9]{3}-[a-f]{2}"}),
    completion("by a choice", structured_outputs={"choice": ["alpha", "beta"]}),
    completion("by a schema", response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}),
    completion("stream", stream=True),
    completion("stream with usage", stream=True, stream_options=USAGE),
    completion("stream with continuous usage", stream=True, stream_options=CONTINUOUS, logprobs=1),
    chat("greedy"),
    chat("with a system message", [{"role": "system", "content": "import os"}, *USER]),
    chat("with parts", [{"role": "user", "content": [{"type": "text", "text": "class A:"}]}]),
    chat("with logprobs", logprobs=True, top_logprobs=2, max_tokens=4),
    chat("by a schema", response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}),
    chat("stream", stream=True),
    chat("stream with usage", stream=True, stream_options=USAGE, logprobs=True, top_logprobs=1),
    completion("error: a temperature below 0", temperature=-1),
    completion("error: too many tokens", max_tokens=5000),
    completion("error: no prompt", None),
    completion("error: stream_options without stream", stream_options=USAGE),
    Recorded("error: an unknown model", "/v1/completions", {"prompt": "a", **GREEDY, "model": "other"}),
]


def send(client: httpx2.Client, request: Recorded) -> dict[str, Any]:
    """The status, and the body: an object, or the list of the objects of a stream."""
    response = client.get(request.path) if request.body is None else client.post(request.path, json=request.body)
    if not response.headers["content-type"].startswith("text/event-stream"):
        return {"status": response.status_code, "body": response.json()}
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", lines
    return {"status": response.status_code, "stream": [json.loads(line) for line in lines[:-1]]}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    with httpx2.Client(base_url=options.url, timeout=120, trust_env=False) as client:
        responses = {request.name: send(client, request) for request in REQUESTS}
    options.out.parent.mkdir(exist_ok=True)
    text = json.dumps(responses, indent=1, ensure_ascii=False).replace(f"{Path.cwd()}/", "")
    options.out.write_text(text + "\n", encoding="utf-8")
    print(f"{len(responses)} responses in {options.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
