"""Command lines of a deployment with the frontend of NVIDIA Dynamo, on one machine with file discovery."""

from sageLLM.runtime.deploy.launch import Process, engines, flags
from sageLLM.runtime.deploy.placement import LOCAL_HOST, DeployError, Placement

ENVIRONMENT = {"DYN_FILE_KV": "/tmp/dynamo", "DYN_EVENT_PLANE": "zmq"}
"""The folder in which workers are found, and the transport of events: neither etcd nor NATS is needed."""


def dynamo_processes(placement: Placement) -> list[Process]:
    """The frontend with the API, and a worker per engine. Raises DeployError for engines on several hosts."""
    frontend = ("python", "-m", "dynamo.frontend", "--http-port", str(placement.http_port))
    found = [Process("frontend", LOCAL_HOST, (*frontend, "--discovery-backend", "file"), ENVIRONMENT)]
    for number, (role, options) in enumerate(engines(placement)):
        if role.nodes > 1:
            raise DeployError(f"{placement.name}: a worker of Dynamo is on one host; set `nodes: 1`")
        name = placement.served_model_name
        named = {} if name is None else {"served_model_name": name}
        arguments = flags({**named, **options, **placement.options})
        command = ("sagellm", "dynamo-worker", placement.model, *arguments)
        found.append(Process(f"{role.name}-{number}", LOCAL_HOST, command, ENVIRONMENT))
    return found
