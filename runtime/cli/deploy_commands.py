"""The commands `sagellm deploy` and `sagellm plan`. Each implementation is imported when it runs."""

from typing import Annotated, Literal

import typer

from sageLLM.runtime.cli.options import with_request
from sageLLM.runtime.cli.plan_request import PlanRequest


def deploy(
    spec: Annotated[str, typer.Argument(help="A deployment of specs/deploy, or a .yaml file with schema: deploy/v1.")],
    target: Annotated[
        Literal["local", "torchrun", "kubernetes", "dynamo", "ray"], typer.Option(help="The kind of output.")
    ] = "local",
    start: Annotated[bool, typer.Option("--start", help="Run the processes of --target local, until Ctrl-C.")] = False,
) -> None:
    """Print the commands or the manifests of a deployment, or run it on this machine."""
    from sageLLM.runtime.cli.deploy import DeployRequest
    from sageLLM.runtime.cli.deploy import deploy as run_deploy

    raise typer.Exit(run_deploy(DeployRequest(spec, target, start)))


@with_request(PlanRequest)
def plan(request: PlanRequest) -> None:
    """Search modes, degrees and ratios for a trace with the simulator, and write the best as a deploy spec."""
    from sageLLM.runtime.cli.plan import run_plan

    raise typer.Exit(run_plan(request))
