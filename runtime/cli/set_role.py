"""`sagellm set-role` lets a worker of a running server take another role."""

from __future__ import annotations

import asyncio
import sys

from sageLLM.runtime.server.http_client import Address, Connection, HttpError


def set_worker_role(url: str, api_key: str | None, number: int, role: str) -> int:
    """Prints the state of the worker to stdout; returns the exit code."""
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        connection = Connection(Address.of(url.removesuffix("/").removesuffix("/v1")), headers)
        worker = asyncio.run(connection.json("POST", f"/v1/workers/{number}/role", {"role": role}))
    except (HttpError, OSError, ValueError) as error:
        print(f"error: the role was not changed: {error}", file=sys.stderr)
        return 1
    left = f"when its {worker['num_requests']} requests have left"
    print(f"worker {number} is {role}" if worker["role"] == role else f"worker {number} is draining: {role} {left}")
    return 0
