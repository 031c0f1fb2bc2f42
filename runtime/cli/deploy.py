"""`sagellm deploy`: prints the commands or manifests of a deployment for a target, or starts it on this machine."""

import os
import secrets
import sys
from dataclasses import dataclass
from typing import Literal

from sageLLM.runtime.cli.deploy_file import find_placement
from sageLLM.runtime.deploy.dynamo import dynamo_processes
from sageLLM.runtime.deploy.kubernetes import manifests, why_open
from sageLLM.runtime.deploy.launch import as_script, host_processes, local_processes
from sageLLM.runtime.deploy.local import run_processes
from sageLLM.runtime.deploy.placement import DeployError, Placement
from sageLLM.runtime.deploy.ray_job import ray_job

Target = Literal["local", "torchrun", "kubernetes", "dynamo", "ray"]


@dataclass(frozen=True, slots=True)
class DeployRequest:
    """The arguments of `sagellm deploy`."""

    spec: str
    target: Target
    starts: bool = False


def deploy(request: DeployRequest) -> int:
    """Prints, or starts, a deployment; errors go to stderr, with exit code 1."""
    try:
        placement, source = find_placement(request.spec)
        if request.starts:
            return _start(placement, request.target)
        text = render_target(placement, request.target, source).rstrip()
        if request.target == "kubernetes" and (reason := why_open(placement)) is not None:
            print(f"warning: {placement.name}: {reason}", file=sys.stderr)
        print(text)
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def render_target(placement: Placement, target: Target, source: str) -> str:
    """The text for a target. Raises DeployError for a deployment that it cannot run."""
    match target:
        case "local":
            return as_script(local_processes(placement))
        case "torchrun":
            return as_script(host_processes(placement))
        case "kubernetes":
            return _rendered("deploy/kubernetes.yaml.jinja", view=manifests(placement), source=source)
        case "dynamo":
            return as_script(dynamo_processes(placement))
        case "ray":
            return _rendered("deploy/ray_job.py.jinja", view=ray_job(placement), source=source)


def _rendered(template: str, **view: object) -> str:
    from sageLLM.codegen.render import Renderer

    return Renderer().render(template, **view)


def _start(placement: Placement, target: Target) -> int:
    if target != "local":
        raise DeployError(f"--start requires --target local, got {target}; run the printed commands there")
    return run_processes(local_processes(placement), local_environment())


def local_environment() -> dict[str, str]:
    """The environment of the processes; hosts of an engine on this machine share a new key, if none is set."""
    keys = {"SAGELLM_KEY", "SAGELLM_KEY_FILE"} & os.environ.keys()
    return {**os.environ, **({} if keys else {"SAGELLM_KEY": secrets.token_hex(16)})}
