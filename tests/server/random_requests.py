"""Random requests, valid and hostile, one for each seed: no 5xx, no hang, always an error object.

    python tests/server/random_requests.py --seeds 0:100000

starts a server and keeps many requests in flight. A failure names its seed; `--seeds 7:8` repeats it. Half of the
fields have values of their type, and a tenth of the bodies is damaged JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import string
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect
from soak import run, write_small_model
from test_process import ServeProcess

from sageLLM.runtime.server.bodies import (
    IGNORED,
    REFUSED,
    ChatBody,
    CompletionBody,
    CountTokensBody,
    DetokenizeBody,
    EmbeddingBody,
    MessagesBody,
    ResponsesBody,
    TokenizeBody,
)
from sageLLM.runtime.server.http_client import Address

KINDS: dict[str, type] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/embeddings": EmbeddingBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountTokensBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
WORDS = ["", "a", "def f(", "\0", "é日本", "float", "base64", "auto", "none", "required", "json_schema", "json_object"]
WORDS += [
    "text",
    "function",
    "tool",
    "user",
    "assistant",
    "system",
    "\ud800",
    "<tool_call>",
    "</think>",
    "{",
    "x" * 300,
]
KEYS = ["role", "content", "type", "text", "name", "function", "parameters", "json", "regex", "choice", "grammar"]
KEYS += ["schema", "json_schema", "properties", "required", "items", "enum", "id", "input", "tool_calls", "arguments"]
KEYS += ["include_usage", "pattern", "$ref", "allOf", "additionalProperties", "tool_use_id", "effort", "budget_tokens"]
LENGTHS = {CompletionBody: "max_tokens", ChatBody: "max_tokens", MessagesBody: "max_tokens"}
STREAM_ENDS = {
    "/v1/completions": (b"data: [DONE]",),
    "/v1/chat/completions": (b"data: [DONE]",),
    "/v1/responses": (b"event: response.completed", b"event: response.incomplete"),
    "/v1/messages": (b"event: message_stop",),
}
"""The last event of a stream."""
SECONDS = 60
ERROR_KEYS = {"message", "type", "param", "code"}


class Draw(random.Random):
    """Random values of JSON."""

    def text(self) -> str:
        if self.random() < 0.7:
            return self.choice(WORDS)
        return "".join(self.choices(string.printable + "é日😀\u2028", k=self.randint(0, 20)))

    def number(self) -> float | int:
        return self.choice(
            [self.randint(-3, 30), self.randint(-(2**70), 2**70), self.uniform(-3, 3), 1e308, 0, 1, 2**31, 2**63]
        )

    def leaf(self) -> Any:
        return self.choice([None, True, False, self.number(), self.text(), self.text()])

    def value(self, depth: int = 3) -> Any:
        kind = self.random() if depth else 0.0
        if kind < 0.6:
            return self.leaf()
        count = self.randint(0, 3)
        if kind < 0.8:
            return [self.value(depth - 1) for _ in range(count)]
        names: list[Callable[[], str]] = [lambda: self.choice(KEYS), self.text]
        return {self.choice(names)(): self.value(depth - 1) for _ in range(count)}

    def of_type(self, kind: inspect.Type) -> Any:
        """A value that the type admits; other rules, such as ranges, may forbid it."""
        match kind:
            case inspect.UnionType(types=types):
                return self.of_type(self.choice(types))
            case inspect.StrType():
                return self.text()
            case inspect.IntType():
                return self.choice([0, 1, 2, self.randint(-3, 30)])
            case inspect.FloatType():
                return self.choice([0.0, 1.0, self.uniform(-1, 3)])
            case inspect.BoolType():
                return self.random() < 0.5
            case inspect.ListType(item_type=item):
                return [self.of_type(item) for _ in range(self.randint(0, 3))]
            case inspect.DictType():
                return {self.choice(KEYS): self.value() for _ in range(self.randint(0, 3))}
            case inspect.NoneType():
                return None
            case _:
                return self.value()

    def schema(self) -> Any:
        """A JSON schema, often one that cannot be enforced."""
        kinds: list[Any] = [{"type": "integer"}, {"enum": [1, "a"]}, {"type": self.text()}, {"pattern": self.text()}]
        kinds += [{"properties": {self.text(): {"type": "boolean"}}, "required": [self.text()]}, self.value(), {}]
        return self.choice(kinds)

    def of_field(self, name: str, kind: inspect.Type) -> Any:
        """A value for a field; those of tools and structured output are seldom valid by chance."""
        function = {"name": self.choice(["look_up", self.text()]), "parameters": self.schema()}
        match name:
            case "tools":
                return [self.choice([{"type": "function", "function": function}, {"type": "function", **function}])]
            case "tool_choice":
                named = {"type": "function", "function": {"name": "look_up"}}
                return self.choice(["auto", "none", "required", named, {"type": "any"}])
            case "response_format" | "text":
                form = {"type": "json_schema", "json_schema": {"name": "a", "schema": self.schema()}}
                return self.choice([form, {"type": "json_object"}, {"type": "text"}, {"format": form}])
            case "structured_outputs":
                forms = {"json": self.schema(), "regex": "[0-9]+", "choice": ["a", self.text()], "grammar": self.text()}
                return {one: forms[one] for one in self.sample(list(forms), self.choice([1, 1, 1, 2]))}
            case _:
                return self.of_type(kind)

    def messages(self) -> list[Any]:
        texts: list[Callable[[], Any]] = [self.text, self.text, lambda: [{"type": "text", "text": self.text()}]]
        some = [{"role": "user", "content": self.choice(texts)()} for _ in range(self.randint(1, 3))]
        for message in some:
            if self.random() < 0.2:
                message["role"] = self.choice(["assistant", "system", "tool", "developer"])
            if self.random() < 0.1:
                message[self.choice(["content", *KEYS])] = self.value()
        return some


@cache
def fields(kind: type) -> dict[str, inspect.Type]:
    found = inspect.type_info(kind)
    assert isinstance(found, inspect.StructType)
    return {field.name: field.type for field in found.fields}


def random_request(seed: int) -> tuple[str, bytes]:
    """A path and a body."""
    draw = Draw(seed)
    path = draw.choice(list(KINDS))
    kind = KINDS[path]
    known = fields(kind)
    body: dict[str, Any] = {}
    [main] = draw.sample([name for name in ("prompt", "input", "tokens", "messages") if name in known], 1)
    valid = draw.messages() if main == "messages" else draw.choice([draw.text(), [1, 2, 3], draw.of_type(known[main])])
    body[main] = draw.value() if draw.random() < 0.1 else valid
    names = [*known, *sorted(IGNORED), *sorted(REFUSED)]
    for _ in range(draw.choice([0, 0, 1, 1, 2, 4])):
        name = draw.choice(names) if draw.random() < 0.95 else draw.text()
        is_valid = name in known and draw.random() < 0.6
        body[name] = draw.of_field(name, known[name]) if is_valid else draw.value()
    if draw.random() < 0.95:
        body["model"] = None
    body[LENGTHS.get(kind, "max_output_tokens")] = draw.choice([1, 2, 3])  # short answers keep the run fast
    if "max_output_tokens" in body and kind is not ResponsesBody:
        del body["max_output_tokens"]
    body.pop("ignore_eos", None)
    data = json.dumps(body, ensure_ascii=draw.random() < 0.9).encode("utf-8", "surrogatepass")
    return path, damaged(data, draw) if draw.random() < 0.1 else data


def damaged(data: bytes, draw: Draw) -> bytes:
    """The bytes with a few of them cut, overwritten or repeated."""
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(data) + 1)
        middle = draw.choice([b"", draw.randbytes(3), b"[" * 100, data[start : start + 10] * 2])
        data = data[:start] + middle + data[start + draw.randint(0, 5) :]
    return data


async def post(address: Address, path: str, data: bytes) -> tuple[int, bytes]:
    """Status and body. Raises OSError, and ValueError for a response that is not HTTP."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(data)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + data)
        start, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    if b"transfer-encoding: chunked" in start.lower():
        body = joined(body)
    return int(start.split()[1]), body


def joined(data: bytes) -> bytes:
    """The body in chunks; a missing last chunk is an error."""
    parts = []
    while True:
        size, _, data = data.partition(b"\r\n")
        if (count := int(size, 16)) == 0:
            return b"".join(parts)
        parts.append(data[:count])
        data = data[count + 2 :]


def why_wrong(path: str, status: int, body: bytes, is_stream: bool) -> str | None:
    if status not in (200, 400, 404):
        return f"status {status}"
    if status != 200:
        found = msgspec.json.decode(body)
        return None if found["error"].keys() == ERROR_KEYS else "no error object"
    if is_stream:
        last = body.strip().rpartition(b"\n\n")[2]
        return None if last.startswith(STREAM_ENDS[path]) and b'"error":{' not in body else "the stream is not complete"
    msgspec.json.decode(body)
    return None


async def fuzz(address: Address, seeds: Iterable[int], concurrency: int) -> Counter[str]:
    """The numbers of answers by status. Raises AssertionError with the seeds of failures."""
    remaining, ends = iter(seeds), Counter[str]()
    failures: list[str] = []
    start = time.monotonic()

    async def worker() -> None:
        for seed in remaining:
            path, data = random_request(seed)
            try:
                status, body = await asyncio.wait_for(post(address, path, data), SECONDS)
                is_stream = path.startswith("/v1") and body.startswith((b"data:", b"event:"))
                reason = why_wrong(path, status, body, is_stream)
            except (TimeoutError, OSError, ValueError, IndexError, KeyError) as error:
                status, body, reason = 0, b"", f"{type(error).__name__}: {error}"
            if reason is not None:
                failures.append(f"seed {seed}: {reason}: {path} {data!r} -> {body[-500:]!r}")
            ends[f"{path} {status}"] += 1
            if ends.total() % 10_000 == 0:
                print(f"{ends.total()} requests in {time.monotonic() - start:.0f} s", flush=True)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    assert not failures, "\n".join(failures[:20])
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:100000", help="FROM:TO")
    parser.add_argument("--concurrency", type=int, default=32)
    options = parser.parse_args()
    first, _, last = options.seeds.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        options_of_server = ("--no-access-log", "--tool-call-parser", "hermes", "--reasoning-parser", "think")
        server = ServeProcess(*options_of_server, model=write_small_model(Path(folder, "model")))
        engine = server.engine_id
        try:
            ends = run(fuzz(Address.of(server.url), range(int(first), int(last)), options.concurrency))
            assert server.engine_id == engine, "the engine was started again"
        except AssertionError:
            print(*(line for line in server.lines if "Error" in line), sep="")
            raise
        finally:
            server.process.terminate()
            server.process.wait(60)
    print(f"{ends.total()} requests, no error of the server")
    for name, count in sorted(ends.items()):
        print(f"  {name:<32} {count}")


if __name__ == "__main__":
    main()
