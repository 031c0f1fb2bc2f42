"""`sagellm serve`: an OpenAI-compatible server in front of an engine process."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sageLLM.runtime.cli.engine_options import EngineOptions
from sageLLM.runtime.cli.serve_engine import EngineSpec, encode_spec, serve_engine
from sageLLM.runtime.errors import EngineError, SageError
from sageLLM.runtime.registry.plugins import load_dialects
from sageLLM.runtime.server.channel import Channel, ProcessChannel, ThreadChannel
from sageLLM.runtime.server.engine_client import EngineClient
from sageLLM.runtime.server.logs import configure_logs
from sageLLM.runtime.server.messages import Ready
from sageLLM.runtime.server.settings import ServerSettings

if TYPE_CHECKING:
    from sageLLM.runtime.server.service import Service

ENGINE = "sageLLM.runtime.cli.serve_engine"


def serve_model(settings: ServerSettings, engine: EngineOptions) -> int:
    """Serves until a signal; returns the exit code. Errors go to stderr.

    On a host besides node 0, and as another rank of torchrun, it runs the ranks of this host and serves nothing.
    """
    try:
        if is_other_node(engine):
            engine.load(Path(settings.model), skip_tokenizer=True)
            return 0
    except (SageError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        from sageLLM.runtime.server.http_server import bind, run_server, why_open
        from sageLLM.runtime.server.service import Service
    except ModuleNotFoundError as error:
        print(f"error: `sagellm serve` requires {error.name}; pip install 'sagellm[serve]'", file=sys.stderr)
        return 1
    configure_logs(settings.log_format, settings.log_level)
    spec = EngineSpec(settings.model, engine, settings.log_level)

    def make_channel() -> Channel:
        if settings.in_process:
            return ThreadChannel(lambda commands, send: serve_engine(spec, commands, send))
        return ProcessChannel(ENGINE, encode_spec(spec))

    async def main() -> int:
        client, dialects = EngineClient(make_channel), load_dialects(engine.plugins or [])
        service = Service(settings, client, engine.generation_config, dialects)
        return await run_server(service, sock, lambda ready, url: on_ready(service, ready, url))

    try:
        if (reason := settings.why_invalid()) is not None:
            raise SageError(reason)
        sock = bind(settings)
        if (warning := why_open(settings, sock)) is not None:
            print(f"warning: {warning}", file=sys.stderr)
    except (SageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        print(f"loading {settings.model}", flush=True)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(main())
    except (SageError, EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if settings.uds is not None:
            Path(settings.uds).unlink(missing_ok=True)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed; it has half the cost per connection and write. None for asyncio's."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


def is_other_node(engine: EngineOptions) -> bool:
    """Whether this process is a host of an engine besides node 0."""
    if engine.nnodes is None and "WORLD_SIZE" not in os.environ:
        return False  # without the import of torch
    from sageLLM.runtime.engine.arguments import choose_node

    num_ranks = engine.tensor_parallel_size * engine.pipeline_parallel_size
    node = choose_node(engine.nnodes, engine.node_rank, engine.master_addr, engine.master_port, num_ranks)
    return node is not None and node.node_rank > 0


def on_ready(service: Service, ready: Ready, url: str) -> None:
    # A collection of all objects takes tens of milliseconds, in which no request is answered; modules stay anyway.
    gc.collect()
    gc.freeze()
    report(service, ready, url)


def report(service: Service, ready: Ready, url: str) -> None:
    """Prints what was chosen, the URL, and a command that works."""
    settings = service.settings
    for line in ready.choices:
        print(line)
    if ready.generates:
        print(service.dialects.for_calls, service.dialects.for_reasoning, sep="\n")
    print(f"serving {settings.model_names[0]} at {url}/v1")
    base = f"--unix-socket {settings.uds} http://localhost" if settings.uds else url
    key = " -H 'Authorization: Bearer KEY'" if settings.api_key else ""
    if ready.generates:
        body = '{"prompt": "def main(", "max_tokens": 32, "temperature": 0}'
        print(f"\n  curl {base}/v1/completions{key} -d '{body}'\n")
    else:
        print(f"\n  curl {base}/v1/embeddings{key} -d " + '\'{"input": "def main("}\'\n')
    sys.stdout.flush()
