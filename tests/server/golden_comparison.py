"""Comparison of a response with a recorded one: status, keys, types, finish reasons, usage and text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

COMPARED = frozenset(
    {"text", "content", "role", "finish_reason", "stop_reason", "object", "index", "tokens", "text_offset", "token_ids"}
    | {"prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "count", "prompt", "token", "bytes"}
    | {"prompt_token_ids", "max_model_len", "token_strs", "code", "param"}
)
"""Keys with values that must be equal; others must have equal types."""
TOLERANCE = 2e-3
"""The most that log-probabilities may differ by."""


def differences(recorded: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The differences as `path: recorded -> found`, without duplicates; positions in lists are not named."""
    if recorded["status"] != found["status"]:
        return [f"status: {recorded['status']} -> {found['status']}"]
    if "stream" in recorded:
        both = ("stream", joined(recorded["stream"]), joined(found["stream"]))
    else:
        both = ("body", recorded["body"], found["body"])
    return list(dict.fromkeys(_compare(*both)))


def _compare(path: str, recorded: Any, found: Any, key: str = "") -> Iterator[str]:
    if isinstance(recorded, dict) and isinstance(found, dict):
        yield from (f"{path}.{name}: missing" for name in recorded if name not in found)
        yield from (f"{path}.{name}: added" for name in found if name not in recorded)
        for name in recorded.keys() & found.keys():
            yield from _compare(f"{path}.{name}", recorded[name], found[name], name)
    elif isinstance(recorded, list) and isinstance(found, list):
        if len(recorded) != len(found):
            yield f"{path}: {len(recorded)} -> {len(found)} entries"
        for one, other in zip(recorded, found, strict=False):
            yield from _compare(f"{path}[]", one, other, key)
    elif "logprob" in path and isinstance(recorded, float) and isinstance(found, float):
        if abs(recorded - found) > TOLERANCE:
            yield f"{path}: {recorded} -> {found}"
    elif key in COMPARED:
        if recorded != found:
            yield f"{path}: {recorded!r} -> {found!r}"
    elif _kind(recorded) != _kind(found):
        yield f"{path}: {_kind(recorded)} -> {_kind(found)}"


def _kind(value: object) -> str:
    return "null" if value is None else "number" if type(value) in (int, float) else type(value).__name__


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream as one object: all keys of its chunks, with texts joined and lists of log-probabilities extended."""
    whole: dict[str, Any] = {}
    for chunk in chunks:
        _join(whole, chunk)
    return whole


def _join(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        old = whole.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            _join(old, value)
        elif name in ("text", "content") and isinstance(value, str) and isinstance(old, str):
            whole[name] = old + value
        elif name == "choices" and isinstance(old, list):
            for one, other in zip(old, value, strict=False):
                _join(one, other)
        elif isinstance(value, list) and isinstance(old, list) and name != "choices":
            whole[name] = old + value
        elif value is not None or name not in whole:
            whole[name] = _copy(value)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copy(one) for name, one in value.items()}
    return [_copy(one) for one in value] if isinstance(value, list) else value
