"""A strict reading of a request that has arrived in one piece, for refusals that do not wait for the parser.

Only the common form is read. For all else the answer is None, and the parser decides; so a message never ends elsewhere
than the parser would say.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import NamedTuple

NAME_CHARS = (string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~").encode()
FRAMING = frozenset({b"transfer-encoding", b"expect", b"upgrade", b"trailer", b"te"})
"""Headers that change how a message is read."""


class WholeRequest(NamedTuple):
    """The path and the headers of a POST; the names are in lower case."""

    path: str
    headers: list[tuple[bytes, bytes]]


def read_whole(data: bytes, first_lines: Mapping[bytes, str]) -> WholeRequest | None:
    """The request, if `data` is exactly one with one of these first lines, a Content-Length and its body."""
    head, end, body = data.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    path = first_lines.get(first)
    if path is None or not end or not head.count(b"\r") == head.count(b"\n") == len(lines) or b"\0" in head:
        return None
    headers = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or name.translate(None, NAME_CHARS):
            return None
        headers.append((name.lower(), value.strip(b" \t")))
    fields = dict(headers)
    if len(fields) < len(headers) or not FRAMING.isdisjoint(fields) or b"host" not in fields:
        return None
    if fields.get(b"content-length") != b"%d" % len(body):
        return None
    if fields.get(b"connection", b"keep-alive").lower() != b"keep-alive":
        return None
    return WholeRequest(path, headers)
