"""The commands `sagellm deploy` and `sagellm plan`. Each implementation is imported when it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def deploy(
    spec: Annotated[str, typer.Argument(help="A deployment of specs/deploy, or a .yaml file with schema: deploy/v1.")],
    target: Annotated[
        Literal["local", "torchrun", "kubernetes", "ray"], typer.Option(help="The kind of output.")
    ] = "local",
    start: Annotated[bool, typer.Option("--start", help="Run the processes of --target local, until Ctrl-C.")] = False,
) -> None:
    """Print the commands or the manifests of a deployment, or run it on this machine."""
    from sageLLM.runtime.cli.deploy import DeployRequest
    from sageLLM.runtime.cli.deploy import deploy as run_deploy

    raise typer.Exit(run_deploy(DeployRequest(spec, target, start)))


def plan(
    model: Annotated[str, typer.Option(help="A config.json, or the folder that holds it.")],
    devices: Annotated[int, typer.Option(min=1, max=256, help="Devices of the deployment.")],
    hardware: Annotated[
        str | None, typer.Option(help="A device of specs/hardware, or a .yaml file (default: h100).")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Azure csv, Mooncake jsonl, or JSON pairs of lengths.")] = None,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Skip invalid rows of the trace.")] = False,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second of a Poisson process (default: the trace's times).")
    ] = None,
    num_requests: Annotated[int | None, typer.Option(min=1, help="Number of requests, from the first one.")] = None,
    prompt: Annotated[tuple[float, float], typer.Option(help="Without a trace: median and p90 of prompt lengths.")] = (
        1020,
        2734,
    ),
    output: Annotated[tuple[float, float], typer.Option(help="Without a trace: median and p90 of answer lengths.")] = (
        129,
        424,
    ),
    seed: Annotated[int, typer.Option(help="Seed of arrivals and lengths.")] = 0,
    slo_ttft: Annotated[float, typer.Option(help="Objective for the time to first token, in seconds.")] = 1.0,
    slo_tpot: Annotated[
        float, typer.Option(help="Objective for the time per output token after it, in seconds.")
    ] = 0.1,
    attainment: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the requests that must meet the objective.")
    ] = 0.9,
    form: Annotated[
        list[str] | None,
        typer.Option(help="together, disaggregated or attention_ffn; can be repeated (default: all)."),
    ] = None,
    max_pp: Annotated[int, typer.Option(min=1, help="The most pipeline stages of a worker.")] = 1,
    name: Annotated[str, typer.Option(help="Name of the deployment in the spec.")] = "planned",
    out: Annotated[Path | None, typer.Option(help="File for the deploy spec (default: print it).")] = None,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Simulate all deployments on all requests.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Search modes, degrees and ratios for a trace with the simulator, and write the best as a deploy spec."""
    from sageLLM.runtime.cli.plan import PlanRequest, run_plan
    from sageLLM.runtime.sim.metrics import Slo

    request = PlanRequest(
        model=model,
        hardware=hardware,
        num_devices=devices,
        slo=Slo(slo_ttft, slo_tpot),
        attainment=attainment,
        trace=trace,
        skips_bad_rows=skip_bad_rows,
        rate=rate,
        num_requests=num_requests,
        prompt=prompt,
        output=output,
        seed=seed,
        forms=form or [],
        max_pp=max_pp,
        name=name,
        out=out,
        is_exhaustive=exhaustive,
        as_json=json,
    )
    raise typer.Exit(run_plan(request))
