"""The engine process of `sagellm serve`: builds the engine from its options, and executes the front's commands.

    python -m sageLLM.runtime.cli.serve_engine FD

FD is an inherited socket, whose first message is the `EngineSpec`. The process ends when the front closes its end, or
when its parent has died.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec

from sageLLM.runtime.cli.engine_options import EngineOptions
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.server.channel import EngineSide
from sageLLM.runtime.server.messages import Command, Crashed, Event, HandoffSpec, Refused
from sageLLM.runtime.transport.channel import read_key

PARENT_CHECK_SECONDS = 0.5


class EngineSpec(msgspec.Struct, frozen=True):
    """The model and the options of an engine; with `handoff` it exchanges the KV of prompts."""

    model: str
    options: EngineOptions
    log_level: str = "info"
    handoff: HandoffSpec | None = None


def encode_spec(spec: EngineSpec) -> bytes:
    return msgspec.json.encode(spec, enc_hook=str)


def decode_spec(data: bytes) -> EngineSpec:
    return msgspec.json.decode(data, type=EngineSpec, dec_hook=_as_path)


def _as_path(kind: type, value: Any) -> Any:
    if kind is not Path:
        raise TypeError(f"no decoder for {kind}")
    return Path(value)


def serve_engine(spec: EngineSpec, commands: SimpleQueue[Command | None], send: Callable[[Event], None]) -> None:
    """Builds the engine, reports that, and serves until None is in the queue."""
    options = spec.options
    try:
        key = b"" if spec.handoff is None else read_key()
        # This loads torch, which the front does not need, and neither does a refusal for a missing key.
        from sageLLM.runtime.server.engine_loop import EngineLoop, describe, warm_up

        llm = options.load(Path(spec.model), skip_tokenizer=True)
    except SageError as error:
        send(Refused(str(error)))
        return
    handoff = None
    try:
        if spec.handoff is not None:
            from sageLLM.runtime.loader.digest import checkpoint_digest
            from sageLLM.runtime.server.kv_handoff import KVHandoff

            handoff = KVHandoff(llm.engine, spec.handoff, commands, key, checkpoint_digest(Path(spec.model)))
        warm_up(llm)
        gc.collect()
        gc.freeze()  # the engine stays until the process ends: a full collection would look at its graphs in vain
        send(describe(llm, options.pd, options.scheduling_policy, options.max_num_seqs))
        EngineLoop(llm, commands, send, handoff).run()
    except SageError as error:
        if handoff is not None or spec.handoff is None:
            raise
        send(Refused(str(error)))
    finally:
        if handoff is not None:
            handoff.close()
        llm.close()


def main() -> None:
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            one, signal.SIG_IGN
        )  # the front decides about the end; systemd signals all processes of a service
    side = EngineSide(int(sys.argv[1]))
    try:
        spec = decode_spec(side.receive_spec())
        text = "%(asctime)s %(levelname)s engine: %(message)s"
        logging.basicConfig(level=spec.log_level.upper(), format=text, stream=sys.stderr)
        side.start_reading()
        try:
            serve_engine(spec, side.commands, side.send)
        except OSError:
            raise
        except BaseException as error:
            logging.getLogger("sagellm").error("the engine ends", exc_info=error)
            side.send(Crashed(f"{type(error).__name__}: {error}"))
    except (OSError, EOFError):
        pass  # the front has hung up
    finally:
        logging.shutdown()
        # Not an ordinary exit, which would wait for threads that compute.
        os._exit(0)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
