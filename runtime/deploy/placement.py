"""A deployment: workers by role, their devices and hosts, and the options that they share."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

RoleName = Literal["both", "prefill", "decode", "attention", "ffn"]
Mode = Literal["hybrid", "time_share", "auto", "strict"]
Limits = Mapping[str, int]
"""Limits of a worker, by the name of their option of `sagellm serve`."""
LOCAL_HOST = "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host name or address; other names may be of any host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class DeployError(ValueError):
    """A deployment that a target cannot run; the message has the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of one host, in Kubernetes' quantities."""

    cpu: str = "4"
    memory: str = "16Gi"
    shared_memory: str = "2Gi"
    accelerator: str = "nvidia.com/gpu"


@dataclass(frozen=True, slots=True)
class Secret:
    """A key of a Kubernetes Secret."""

    name: str
    key: str


@dataclass(frozen=True, slots=True)
class Role:
    """The workers of a role: `count` workers of `tp` x `pp` devices, each on `nodes` hosts."""

    name: RoleName
    count: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    nodes: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    hosts: tuple[str, ...] = ()
    limits: Limits = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)

    @property
    def devices_per_worker(self) -> int:
        return self.tp * self.pp

    @property
    def devices_per_host(self) -> int:
        return self.devices_per_worker // self.nodes

    @property
    def num_devices(self) -> int:
        return self.count * self.devices_per_worker

    def host(self, worker: int, node: int) -> str:
        """The address of a host of a worker."""
        if not self.hosts:
            return LOCAL_HOST
        return self.hosts[0] if len(self.hosts) == 1 else self.hosts[worker * self.nodes + node]


@dataclass(frozen=True, slots=True)
class Placement:
    """One deployment of one model. `options` are further options of `sagellm serve`."""

    name: str
    model: str
    roles: Mapping[RoleName, Role]
    summary: str = ""
    served_model_name: str | None = None
    hardware: str | None = None
    image: str = "sagellm:latest"
    mode: Mode | None = None
    transport: str = "auto"
    num_ubatches: int = 1
    limits: Limits = field(default_factory=dict)
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    http_port: int = 8000
    engine_port: int = 29501
    api_key: Secret | None = None
    cluster_key: Secret | None = None
    ttft_s: float = 1.0
    tpot_s: float = 0.1

    @property
    def object_name(self) -> str:
        """The name in Kubernetes, which allows no underscores."""
        return self.name.replace("_", "-")

    @property
    def num_devices(self) -> int:
        return sum(role.num_devices for role in self.roles.values())

    @property
    def is_disaggregated(self) -> bool:
        """Whether prefill and decode have different workers."""
        return "prefill" in self.roles

    def limits_of(self, role: Role) -> Limits:
        """The limits of a role: its own, else those of the deployment."""
        return {**self.limits, **role.limits}
