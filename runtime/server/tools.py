"""The tools of a request: checks of `tools` and `tool_choice`, with OpenAI's and vLLM's rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sageLLM.runtime.core.dialects.grammar import CannotConstrain, Constraint, call_grammar
from sageLLM.runtime.core.dialects.model import Calls
from sageLLM.runtime.grammar.json_schema import why_not_enforced
from sageLLM.runtime.sampling.structured_outputs import StructuredOutputsParams
from sageLLM.runtime.server.errors import ApiError

MAX_TOOLS = 256
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that an answer may call. `choice` is none, auto, required or named, the last with `name`.

    `definitions` are those of the request, for the chat template; `schemas` those of parameters by function.
    """

    definitions: list[dict[str, Any]] = field(default_factory=list)
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    choice: str = "none"
    name: str | None = None
    is_parallel: bool = True

    @property
    def may_call(self) -> bool:
        return self.choice != "none"

    @property
    def is_forced(self) -> bool:
        return self.choice in ("required", "named")


def tool_use(tools: list[Any] | None, choice: object, is_parallel: bool) -> ToolUse:
    """Raises ApiError 400."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "When using `tool_choice`, `tools` must be set.", "tool_choice")
        return ToolUse()
    if len(tools) > MAX_TOOLS:
        raise ApiError(400, f"tools must have at most {MAX_TOOLS} entries, got {len(tools)}", "tools")
    schemas: dict[str, Mapping[str, Any]] = {}
    for number, tool in enumerate(tools):
        name, schema = _function(tool, f"tools[{number}]")
        if name in schemas:
            raise ApiError(400, f"tools[{number}].function.name is '{name}' again; names must be unique", "tools")
        schemas[name] = schema
    kind, name_or_none = _choice(choice, schemas)
    return ToolUse(tools, schemas, kind, name_or_none, is_parallel)


def usable_tools(calls: Calls | None, use: ToolUse) -> ToolUse:
    """The tools, if calls of them can be read by the dialect. Raises ApiError 400."""
    if use.may_call and calls is None:
        raise ApiError(
            400,
            "tools require a dialect: no known one has its marks in the chat template; serve with --tool-call-parser "
            "NAME, or set tool_choice to 'none'",
            "tools",
        )
    return use


def forced_calls(calls: Calls, use: ToolUse, base: Constraint) -> StructuredOutputsParams:
    """The grammar that forces a call; `base` has the facts that do not depend on the tools. Raises ApiError 400."""
    tools = {name: use.schemas[name] for name in ([use.name] if use.name is not None else use.schemas)}
    for name, schema in tools.items():
        if reason := why_not_enforced(schema):
            raise ApiError(400, f"the parameters of '{name}': {reason}", "tools")
    is_parallel = use.is_parallel and use.choice == "required"
    try:
        text = call_grammar(calls, replace(base, tools=tools, is_parallel=is_parallel))
    except CannotConstrain as error:
        raise ApiError(400, f"this model's calls cannot be forced: {error}", "tools") from None
    return StructuredOutputsParams(grammar=text)


def _function(tool: object, place: str) -> tuple[str, Mapping[str, Any]]:
    """The name and the schema of the parameters."""
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        raise ApiError(400, f"{place} must be an object of type 'function'", "tools")
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{place}.function must be an object with a name", "tools")
    name = function["name"]
    if not NAME.fullmatch(name):
        rule = "must have 1 to 64 letters, digits, '_', '-' and '.'"
        raise ApiError(400, f"{place}.function.name {rule}, got {name[:80]!r}", "tools")
    schema = function.get("parameters")
    if schema is not None and not isinstance(schema, dict):
        raise ApiError(400, f"{place}.function.parameters must be a JSON schema, an object", "tools")
    return name, schema or {"type": "object", "properties": {}}


def _choice(choice: object, schemas: Mapping[str, object]) -> tuple[str, str | None]:
    if choice is None:
        return "auto", None
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            rule = "tool_choice must be 'none', 'auto', 'required' or a named function"
            raise ApiError(400, f"{rule}, got {choice[:80]!r}", "tool_choice")
        return choice, None
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(choice, dict) or choice.get("type") != "function" or not isinstance(name, str):
        rule = "tool_choice must be {'type': 'function', 'function': {'name': NAME}} or a text"
        raise ApiError(400, rule, "tool_choice")
    if name not in schemas:
        text = "The tool specified in `tool_choice` does not match any of the specified `tools`"
        raise ApiError(400, f"{text}: {name[:80]!r}", "tool_choice")
    return "named", name
