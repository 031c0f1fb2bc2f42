"""A Ray job of a deployment: one actor per host of an engine, each of which runs that host's command."""

from dataclasses import dataclass

from sageLLM.runtime.deploy.launch import API_KEY, ENGINE_KEY, engines, flags, server_options
from sageLLM.runtime.deploy.placement import Placement


@dataclass(frozen=True, slots=True)
class RayEngine:
    """One engine: the commands of its hosts without the address of the first, which Ray knows when they are placed.

    The server listens on that address.
    """

    name: str
    num_nodes: int
    leader: tuple[str, ...]
    worker: tuple[str, ...]
    port: int
    num_cpus: float
    num_gpus: int


@dataclass(frozen=True, slots=True)
class RayJob:
    """The engines of a deployment."""

    name: str
    engines: tuple[RayEngine, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The variables with keys that the job must have in its environment."""
        return (API_KEY, ENGINE_KEY) if any(one.num_nodes > 1 for one in self.engines) else (API_KEY,)


def ray_job(placement: Placement) -> RayJob:
    """The job of a deployment. Raises DeployError for one that cannot run."""
    found = []
    for number, (role, options) in enumerate(engines(placement)):
        server = flags(server_options(placement, None, placement.http_port + number))
        shared = placement.roles.values() if role.name != "both" else ()
        devices = sum(one.num_devices for one in shared) or role.devices_per_host
        found.append(
            RayEngine(
                name=f"{role.name}-{number}",
                num_nodes=role.nodes,
                leader=("sagellm", "serve", placement.model, *flags(options), *server),
                worker=("sagellm", "worker"),
                port=placement.engine_port + number,
                num_cpus=_cores(role.resources.cpu),
                num_gpus=devices if role.device == "cuda" else 0,
            )
        )
    return RayJob(placement.name, tuple(found))


def _cores(quantity: str) -> float:
    """The number of cores of a quantity of Kubernetes."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
