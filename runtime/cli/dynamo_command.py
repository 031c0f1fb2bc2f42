"""The command `sagellm dynamo-worker`. Its implementation is imported when it runs."""

from typing import Annotated, Literal

import typer

from sageLLM.runtime.cli.engine_options import EngineOptions, with_engine_options


@with_engine_options()
def dynamo_worker(
    model: Annotated[str, typer.Argument(help="A Hugging Face checkpoint folder.")],
    served_model_name: Annotated[str | None, typer.Option(help="Name in the API (default: MODEL).")] = None,
    namespace: Annotated[str, typer.Option(help="Dynamo's namespace.")] = "dynamo",
    component: Annotated[str, typer.Option(help="Component in it.")] = "backend",
    endpoint: Annotated[str, typer.Option(help="Endpoint of the component.")] = "generate",
    discovery_backend: Annotated[str, typer.Option(help="kubernetes, etcd, file or mem.")] = "file",
    request_plane: Annotated[str, typer.Option(help="tcp or nats.")] = "tcp",
    event_plane: Annotated[str | None, typer.Option(help="zmq or nats.")] = "zmq",
    endpoint_types: Annotated[str, typer.Option(help="chat, completions, or both with a comma.")] = "chat,completions",
    disaggregation_mode: Annotated[
        Literal["agg", "prefill", "decode"],
        typer.Option(help="Compute prompts and answers, prompts for decode workers, or answers; needs SAGELLM_KEY."),
    ] = "agg",
    kv_host: Annotated[
        str, typer.Option(help="Address of this host for copies of KV between prefill and decode workers.")
    ] = "127.0.0.1",
    *,
    engine: EngineOptions,
) -> None:
    """Serve a checkpoint as a worker of NVIDIA Dynamo: its frontend has the API."""
    from sageLLM.runtime.cli.dynamo_worker import WorkerRequest, run_dynamo_worker

    request = WorkerRequest(
        model=model,
        served_model_name=served_model_name,
        namespace=namespace,
        component=component,
        endpoint=endpoint,
        discovery_backend=discovery_backend,
        request_plane=request_plane,
        event_plane=event_plane,
        endpoint_types=endpoint_types,
        disaggregation_mode=disaggregation_mode,
        kv_host=kv_host,
        engine=engine,
    )
    raise typer.Exit(run_dynamo_worker(request))
