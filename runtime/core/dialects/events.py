"""Parts of a parsed answer."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass

from sageLLM.runtime.core.dialects.model import Calls

_ALNUM = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The beginning of a call; its arguments follow in pieces."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON of the arguments of a call."""

    index: int
    text: str


Event = Content | Thought | CallStart | CallArguments


def new_id(calls: Calls, name: str, index: int) -> str:
    """A new id in the form of the dialect."""
    parts = {
        "{hex}": secrets.token_hex(16),
        "{alnum9}": "".join(secrets.choice(_ALNUM) for _ in range(9)),
        "{name}": name,
        "{index}": str(index),
    }
    text = calls.ids
    for hole, value in parts.items():
        text = text.replace(hole, value)
    return text


def joined(events: list[Event]) -> list[Event]:
    """Neighbouring texts of one kind as one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Content | Thought) and type(last) is type(event):
            found[-1] = type(event)(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and last.index == event.index:
            found[-1] = CallArguments(event.index, last.text + event.text)
        else:
            found.append(event)
    return found
