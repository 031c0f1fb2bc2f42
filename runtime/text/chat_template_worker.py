"""Child process that renders a chat template: a script of `chat_template.py`, one JSON line in, one out.

A template is a program from a checkpoint. The sandbox keeps it away from Python's internals, and the limits of this
process keep it from taking the engine's memory; the parent enforces the deadline.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from typing import IO, Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.utils
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the assistant's text for training; rendered unchanged."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class SafeNamespace(jinja2.utils.Namespace):
    """A namespace that rejects names with a leading underscore, so that a template cannot set Python's internals."""

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set the attribute {name!r}")
        super().__setitem__(name, value)


class OutputTooLongError(Exception):
    """The rendered text exceeds its limit."""


class RefusedError(Exception):
    """The template called raise_exception."""


def raise_exception(message: object) -> None:
    raise RefusedError(str(message))


def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON. Jinja's built-in filter escapes HTML characters, which would change the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["namespace"] = SafeNamespace
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def render(template: jinja2.Template, variables: dict[str, Any], max_chars: int) -> str:
    # Piece by piece, so that a template that writes without end is stopped at the limit and not at the deadline.
    pieces, num_chars = [], 0
    for piece in template.generate(variables):
        num_chars += len(piece)
        if num_chars > max_chars:
            raise OutputTooLongError
        pieces.append(piece)
    return "".join(pieces)


def content_form(tree: nodes.Template) -> str:
    """The contents of messages that a template reads: "text", "parts" (a list), or "any".

    Reads parts: a loop over the content, or a filter over its items. A template that also tests the type of the content
    reads both.
    """
    contents = {"content"}

    def is_content(node: nodes.Node | None) -> bool:
        match node:
            case nodes.Name():
                return node.name in contents
            case nodes.Getattr():
                return node.attr == "content"
            case nodes.Getitem():
                return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
            case nodes.Filter() | nodes.Not() | nodes.Test():
                return is_content(node.node)
            case nodes.CondExpr():
                return is_content(node.expr1) or is_content(node.expr2)
            case nodes.And() | nodes.Or():
                return is_content(node.left) or is_content(node.right)
            case _:
                return False

    assigns = list(tree.find_all(nodes.Assign))
    contents |= {a.target.name for a in assigns if isinstance(a.target, nodes.Name) and is_content(a.node)}
    loops = any(is_content(loop.iter) for loop in tree.find_all(nodes.For))
    maps = any(
        f.name in ("map", "selectattr", "rejectattr") and is_content(f.node) for f in tree.find_all(nodes.Filter)
    )
    if not loops and not maps:
        return "text"
    types = ("string", "sequence", "iterable", "mapping")
    return "any" if any(t.name in types and is_content(t.node) for t in tree.find_all(nodes.Test)) else "parts"


def describe(error: BaseException) -> dict[str, str]:
    """The reply for an error, which the parent turns into an exception."""
    if isinstance(error, OutputTooLongError):
        return {"error": "too long"}
    if isinstance(error, MemoryError):
        return {"error": "memory"}
    if isinstance(error, RefusedError):
        return {"error": "refused", "message": str(error)}
    line = getattr(error, "lineno", None)
    location = f" (line {line})" if line else ""
    return {"error": "failed", "message": f"{type(error).__name__}: {error}{location}"}


def limit_memory(max_bytes: int) -> None:
    """Limits the address space. Systems without `resource` (Windows) only have the limits of time and output."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Serves renderings. The first line has template, max_chars and max_bytes, each later one the variables."""

    def reply(value: object) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    # The imports are done, which can take seconds: from here on the parent's deadline for each line applies.
    reply({"ready": True})
    settings = json.loads(requests.readline())
    limit_memory(settings["max_bytes"])
    try:
        environment = make_environment()
        template = environment.from_string(settings["template"])
        form = content_form(environment.parse(settings["template"]))
    except (Exception, MemoryError) as error:
        reply(describe(error))
        return
    reply({"compiled": form})
    for line in requests:
        try:
            answer: dict[str, str] = {"text": render(template, json.loads(line), settings["max_chars"])}
        except (Exception, MemoryError) as error:
            answer = describe(error)
        reply(answer)


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
