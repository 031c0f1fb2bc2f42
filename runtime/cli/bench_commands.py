"""`sagellm bench`: measurements of this machine and of the engine on it."""

from pathlib import Path
from typing import Annotated

import typer

from sageLLM.runtime.cli.bench_serve_options import ServeBench
from sageLLM.runtime.cli.engine_options import EngineOptions, with_engine_options
from sageLLM.runtime.cli.options import with_request

bench_app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Measure this machine, and the engine on it."
)

Model = Annotated[Path, typer.Option(help="A Hugging Face checkpoint folder.")]
InputLen = Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")]
OutputLen = Annotated[int, typer.Option(min=1, help="Tokens of each answer.")]
Seed = Annotated[int, typer.Option(help="Seed of the random prompts.")]
OutputJson = Annotated[Path | None, typer.Option(help="Write the figures to this file as well, as JSON.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@bench_app.command()
def hardware(
    out: Annotated[Path | None, typer.Option(help="File of the entry (default: stdout).")] = None,
    name: Annotated[str, typer.Option(help="Name of the entry.")] = "measured",
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="Measure as one of so many ranks, all at the same time.")
    ] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of a rank (default: its share of cores).")] = None,
    dtype: Annotated[str, typer.Option(help="Element type of the kernels: bfloat16, float16 or float32.")] = "bfloat16",
    runs: Annotated[int, typer.Option(min=1, help="Runs of each kernel, of which the shortest counts.")] = 3,
    disk_folder: Annotated[
        Path | None, typer.Option(help="Folder for the disk's rate (default: temporary files).")
    ] = None,
    json: Json = False,
) -> None:
    """Measure this machine's limits and kernels, and write a hardware entry for --hardware."""
    from sageLLM.runtime.bench.hardware import HardwareRequest
    from sageLLM.runtime.cli.bench import bench_hardware

    request = HardwareRequest(name, tensor_parallel_size, threads, dtype, runs, disk_folder=disk_folder)
    raise typer.Exit(bench_hardware(request, out, as_json=json))


@bench_app.command()
@with_engine_options()
def steps(
    model: Model,
    hardware: Annotated[str, typer.Option(help="A device of specs/hardware, or a .yaml file.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each kind of step.")] = 5,
    json: Json = False,
    *,
    engine: EngineOptions,
) -> None:
    """Compare the times of the engine's steps with those that a hardware entry predicts."""
    from sageLLM.runtime.cli.bench import bench_steps

    raise typer.Exit(bench_steps(model, hardware, rounds, engine, as_json=json))


@bench_app.command()
@with_engine_options()
def throughput(
    model: Model,
    num_prompts: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 1000,
    input_len: InputLen = 1024,
    output_len: OutputLen = 128,
    seed: Seed = 0,
    output_json: OutputJson = None,
    json: Json = False,
    *,
    engine: EngineOptions,
) -> None:
    """Measure the throughput of many requests that arrive at once, as `vllm bench throughput` does."""
    from sageLLM.runtime.cli.bench import OfflineRequest, bench_throughput

    request = OfflineRequest(model, engine, input_len, output_len, seed, output_json, as_json=json)
    raise typer.Exit(bench_throughput(request, num_prompts))


@bench_app.command()
@with_engine_options()
def latency(
    model: Model,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests of a batch.")] = 8,
    input_len: InputLen = 32,
    output_len: OutputLen = 128,
    num_iters_warmup: Annotated[int, typer.Option(min=0, help="Batches that are not measured.")] = 10,
    num_iters: Annotated[int, typer.Option(min=1, help="Batches that are measured.")] = 30,
    seed: Seed = 0,
    output_json: OutputJson = None,
    json: Json = False,
    *,
    engine: EngineOptions,
) -> None:
    """Measure the latency of a batch of requests, as `vllm bench latency` does."""
    from sageLLM.runtime.cli.bench import OfflineRequest, bench_latency

    request = OfflineRequest(model, engine, input_len, output_len, seed, output_json, as_json=json)
    raise typer.Exit(bench_latency(request, batch_size, num_iters_warmup, num_iters))


@bench_app.command("serve")
@with_request(ServeBench)
def serve_(request: ServeBench) -> None:
    """Measure a running server with random prompts, as `vllm bench serve` does."""
    from sageLLM.runtime.cli.bench_serve import bench_serve

    raise typer.Exit(bench_serve(request))
