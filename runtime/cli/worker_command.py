"""`sagellm worker` runs the ranks of a host for an engine on another one."""

import sys
from typing import Annotated

import typer


def worker(
    nnodes: Annotated[int, typer.Option(help="Hosts of the ranks.")],
    node_rank: Annotated[int, typer.Option(help="Number of this host, from 1.")],
    master_addr: Annotated[str, typer.Option(help="Address of node 0.")] = "127.0.0.1",
    master_port: Annotated[int, typer.Option(help="Port of node 0.")] = 29501,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the engine to start.")] = 300.0,
) -> None:
    """Run the ranks of this host for the engine on node 0, until it ends.

    The engine sends the model's path and all options. The key in SAGELLM_KEY must be that of the engine.
    """
    from sageLLM.runtime.errors import SageError
    from sageLLM.runtime.worker.node import Node, serve_node

    try:
        if not 1 <= node_rank < nnodes:
            raise SageError(f"node_rank must be 1 to nnodes - 1 = {nnodes - 1}, got {node_rank}")
        serve_node(Node(nnodes, node_rank, master_addr, master_port), timeout)
    except SageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
