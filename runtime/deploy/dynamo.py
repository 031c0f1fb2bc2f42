"""Command lines of a deployment with the frontend of NVIDIA Dynamo, on one machine with file discovery."""

from collections.abc import Mapping

from sageLLM.runtime.deploy.launch import Process, engine_options, engines, flags
from sageLLM.runtime.deploy.placement import LOCAL_HOST, DeployError, Placement, Role

ENVIRONMENT = {"DYN_FILE_KV": "/tmp/dynamo", "DYN_EVENT_PLANE": "zmq"}
"""The folder in which workers are found, and the transport of events: neither etcd nor NATS is needed."""


def dynamo_processes(placement: Placement) -> list[Process]:
    """The frontend with the API, and its workers. Raises DeployError for engines on several hosts."""
    found = [Process("frontend", LOCAL_HOST, frontend_command(placement, "file", LOCAL_HOST), ENVIRONMENT)]
    if has_engine_per_worker(placement):
        for role in placement.roles.values():
            command = worker_command(placement, role)
            names = [f"{role.name}-{number}" for number in range(role.count)]
            found += [Process(name, LOCAL_HOST, command, ENVIRONMENT) for name in names]
        return found
    for number, (role, options) in enumerate(engines(placement)):
        if role.nodes > 1:
            raise DeployError(f"{placement.name}: a worker of Dynamo is on one host; set `nodes: 1`")
        found.append(Process(f"{role.name}-{number}", LOCAL_HOST, _worker(placement, options), ENVIRONMENT))
    return found


def has_engine_per_worker(placement: Placement) -> bool:
    """Whether each prefill and decode worker is an engine of its own, which copies KV to others over TCP."""
    return placement.is_disaggregated and placement.transport == "tcp"


def frontend_command(placement: Placement, discovery: str, host: str) -> tuple[str, ...]:
    """Dynamo's frontend, with the API on this address; its own default is all of them."""
    address = ("--http-host", host, "--http-port", str(placement.http_port))
    return ("python", "-m", "dynamo.frontend", *address, "--discovery-backend", discovery)


def worker_command(placement: Placement, role: Role, **options: object) -> tuple[str, ...]:
    """A prefill or decode worker that is an engine. Raises DeployError for one of several devices, or on a GPU."""
    if role.devices_per_worker > 1 or role.device != "cpu":
        raise DeployError(
            f"{placement.name}: prefill and decode workers that are engines run on one CPU device; set `tp: 1`, "
            "`pp: 1` and `device: cpu`, or `transport: shm`"
        )
    mode = {"component": role.name, "disaggregation_mode": role.name}
    limits = {name: value for name, value in engine_options(placement, role).items() if name != "pd"}
    return _worker(placement, mode | options | limits)


def _worker(placement: Placement, options: Mapping[str, object]) -> tuple[str, ...]:
    name = placement.served_model_name
    named = {} if name is None else {"served_model_name": name}
    return ("sagellm", "dynamo-worker", placement.model, *flags({**named, **options, **placement.options}))
