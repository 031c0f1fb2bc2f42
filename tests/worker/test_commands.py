"""Commands of a worker process: those for copies of KV do not wait for the step that is computed."""

from __future__ import annotations

import threading
from multiprocessing import Pipe
from typing import cast

import msgspec
import pytest

from sageLLM.runtime.transport.handle import PieceKey
from sageLLM.runtime.worker.kv_group import CancelKV, KVCommand, KVPort
from sageLLM.runtime.worker.process import Reset, received

SECONDS = 20.0


class Port:
    """Records its commands."""

    def __init__(self) -> None:
        self.commands: list[KVCommand] = []
        self.has_some = threading.Event()

    def handle(self, command: KVCommand) -> None:
        self.commands.append(command)
        self.has_some.set()


def test_a_copy_is_cancelled_while_a_step_is_computed() -> None:
    ours, theirs = Pipe()
    port, cancel = Port(), CancelKV(PieceKey("r", 0, 0))
    for command in (Reset(), cancel, Reset()):
        ours.send_bytes(msgspec.msgpack.encode(command))
    commands = received(theirs, cast("KVPort", port))
    assert next(commands) == Reset()
    assert port.has_some.wait(SECONDS), "the first order has not ended"
    assert port.commands == [cancel]
    assert next(commands) == Reset()
    ours.close()
    with pytest.raises(EOFError):
        next(commands)
