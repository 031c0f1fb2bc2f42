"""`sagellm bench`: measurements of this machine and of the engine on it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sageLLM.runtime.cli.engine_options import EngineOptions, with_engine_options

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
def serve_(
    base_url: Annotated[str, typer.Option(help="URL of a running server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Name of the model (default: the first one served).")] = None,
    backend: Annotated[
        Literal["openai", "openai-chat"], typer.Option(help="Completions of token ids, or chat of random words.")
    ] = "openai",
    num_prompts: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 1000,
    random_input_len: InputLen = 1024,
    random_output_len: OutputLen = 128,
    random_range_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Input lengths vary by this share in both directions.")
    ] = 0.0,
    request_rate: Annotated[float, typer.Option(help="Requests per second; inf sends all at once.")] = float("inf"),
    burstiness: Annotated[
        float, typer.Option(min=1e-6, help="Shape of the gamma distribution of arrivals; 1 is a Poisson process.")
    ] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Requests under way at once.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Generate all tokens of each answer.")] = True,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: Seed = 0,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts have ids below this (default: by the config of the model).")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="API key of the server.", envvar="SAGELLM_API_KEY")] = None,
    percentile_metrics: Annotated[
        str, typer.Option(help="Of ttft, tpot, itl, e2el; separated by commas.")
    ] = "ttft,tpot,itl",
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles, separated by commas.")] = "99",
    result_filename: Annotated[Path | None, typer.Option(help="Write the result to this file, as JSON.")] = None,
    save_detailed: Annotated[bool, typer.Option(help="Write times and text of every request too.")] = False,
    disable_tqdm: Annotated[bool, typer.Option("--disable-tqdm", help="Show no progress.")] = False,
    json: Json = False,
) -> None:
    """Measure a running server with random prompts, as `vllm bench serve` does."""
    from sageLLM.runtime.cli.bench_serve import ServeBench, bench_serve

    bench = ServeBench(
        base_url=base_url,
        model=model,
        backend=backend,
        num_prompts=num_prompts,
        random_input_len=random_input_len,
        random_output_len=random_output_len,
        random_range_ratio=random_range_ratio,
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        ignore_eos=ignore_eos,
        temperature=temperature,
        seed=seed,
        vocab_size=vocab_size,
        api_key=api_key,
        percentile_metrics=percentile_metrics,
        metric_percentiles=metric_percentiles,
        result_filename=result_filename,
        save_detailed=save_detailed,
        shows_progress=not disable_tqdm,
        as_json=json,
    )
    raise typer.Exit(bench_serve(bench))
