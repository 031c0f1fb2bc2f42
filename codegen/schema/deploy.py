"""Schema of deploy files: the workers of a deployment by role, their hosts, and the options that they share."""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from sageLLM.codegen.schema.base import BrokenRule, Strict

RoleName = Literal["both", "prefill", "decode", "attention", "ffn"]
ROLE_SETS: tuple[frozenset[str], ...] = (
    frozenset({"both"}),
    frozenset({"prefill", "decode"}),
    frozenset({"attention", "ffn"}),
)
LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
"""A label of DNS, as names of objects in Kubernetes must be."""
ADDRESS = r"^[A-Za-z0-9_][A-Za-z0-9_.:-]*$"
OPTION = r"^[a-z][a-z0-9]*([_-][a-z0-9]+)*$"
TARGET_SETS = "omit it: every target sets the address of the API, loopback where no other host reaches it"
OWN_FIELDS: dict[str, str] = {
    "api_key": "omit it: no deployment contains a key; name a Secret by `secrets.api_key`, or set SAGELLM_API_KEY",
    **dict.fromkeys(("host", "uds", "kv_host"), TARGET_SETS),
    "port": "write `ports: {http: PORT}`",
    **dict.fromkeys(("nnodes", "node_rank", "master_addr"), "write `nodes` and `hosts` of the role"),
    "master_port": "write `ports: {engine: PORT}`",
    "served_model_name": "write the field `served_model_name`",
    "device": "write `device` of the role",
    "pd": "write the field `mode`",
    "af": "write the roles `attention` and `ffn`",
    "num_ubatches": "write the field `num_ubatches`",
    "kv_transport": "write the field `transport`",
    **dict.fromkeys(("prefill_workers", "decode_workers"), "write `count` of the role"),
    **dict.fromkeys(
        ("tensor_parallel_size", "prefill_tensor_parallel_size", "decode_tensor_parallel_size"),
        "write `tp` of the role",
    ),
    "pipeline_parallel_size": "write `pp` of the role",
    "enable_expert_parallel": "write `ep` of the role",
}
"""Options of `sagellm serve` that fields of a deployment set, and the remedy: a second value would replace theirs."""
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"


class LimitsSpec(Strict):
    """Limits of a worker; one that is not set has the default of `sagellm serve`."""

    max_model_len: int | None = Field(default=None, ge=1, description="longest prompt and answer together, in tokens")
    max_num_seqs: int | None = Field(default=None, ge=1, description="requests per step")
    max_num_batched_tokens: int | None = Field(default=None, ge=2, description="tokens per step")
    prefill_chunk_size: int | None = Field(default=None, ge=1, description="prompt tokens per hybrid step")
    num_kv_blocks: int | None = Field(default=None, ge=1, description="KV blocks of a worker")
    block_size: int | None = Field(default=None, ge=1, description="tokens per KV block")


class ResourcesSpec(Strict):
    """Resources of one host of a worker, in Kubernetes' quantities; requested and limited alike."""

    cpu: str = Field(default="4", pattern=QUANTITY, description="CPU cores")
    memory: str = Field(default="16Gi", pattern=QUANTITY, description="memory")
    shared_memory: str = Field(
        default="2Gi", pattern=QUANTITY, description="size of /dev/shm, used by the ranks of a host"
    )
    accelerator: str = Field(
        default="nvidia.com/gpu",
        pattern=r"^[a-z0-9.-]+/[a-z0-9.-]+$",
        description="resource of a device, if `device` is cuda",
    )


class RoleSpec(Strict):
    """The workers of one role. A worker is one engine, or one part of it, with `tp` x `pp` devices on `nodes` hosts."""

    count: int = Field(default=1, ge=1, le=1024, description="number of workers")
    tp: int = Field(default=1, ge=1, le=1024, description="tensor-parallel degree: devices that share each layer")
    pp: int = Field(
        default=1, ge=1, le=256, description="pipeline-parallel degree: stages that the layers are divided into"
    )
    ep: int = Field(
        default=1, ge=1, le=1024, description="expert-parallel degree: 1, or `tp` to keep each expert whole"
    )
    nodes: int = Field(default=1, ge=1, le=256, description="hosts of a worker; they have equal numbers of devices")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="kind of the devices")
    hosts: list[str] = Field(default=[], description="addresses of the hosts, those of the first worker first")
    limits: LimitsSpec = Field(default=LimitsSpec(), description="limits that differ from those of the deployment")
    resources: ResourcesSpec = Field(default=ResourcesSpec(), description="resources of a host")

    @field_validator("hosts")
    @classmethod
    def _addresses(cls, hosts: list[str]) -> list[str]:
        for host in hosts:
            if not re.fullmatch(ADDRESS, host):
                raise BrokenRule(
                    f"'{host[:40]}' is not the name or address of a host", "write a host name or an IP address"
                )
        return hosts

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.tp * self.pp) % self.nodes:
            raise BrokenRule(
                f"`nodes` must divide `tp` * `pp` = {self.tp * self.pp}, got {self.nodes}",
                "assign as many devices to each host, or change `nodes`",
            )
        if self.ep not in (1, self.tp):
            raise BrokenRule(
                f"`ep` must be 1 or `tp` = {self.tp}, got {self.ep}",
                "experts are divided over the ranks of a worker: write `ep: 1`, or the value of `tp`",
            )
        wanted = self.count * self.nodes
        if self.hosts and len(self.hosts) not in (1, wanted):
            raise BrokenRule(
                f"`hosts` must name {wanted} hosts (`count` * `nodes`) or 1, got {len(self.hosts)}",
                "name the hosts of all workers in order, or one host for all of them",
            )
        return self


class SecretSpec(Strict):
    """A key of a Kubernetes Secret. The secret itself is made by the operator; its value is never in a file here."""

    name: str = Field(pattern=LABEL, max_length=63, description="name of the Secret")
    key: str = Field(pattern=r"^[-._a-zA-Z0-9]+$", description="key inside it")


class SecretsSpec(Strict):
    """References to secrets, and none of their values."""

    api_key: SecretSpec | None = Field(
        default=None, description="key that requests must have; `SAGELLM_API_KEY` of the server"
    )
    cluster_key: SecretSpec | None = Field(
        default=None, description="key that the hosts of an engine share; `SAGELLM_KEY`, required by `nodes` above 1"
    )


class PortsSpec(Strict):
    """Ports of the processes; further workers on one host count upwards."""

    http: int = Field(default=8000, ge=1, le=65000, description="API of the first server")
    engine: int = Field(default=29501, ge=1, le=65000, description="node 0 of the first engine with several hosts")


class ObjectiveSpec(Strict):
    """Service level objective, for simulations and mode auto."""

    ttft_s: float = Field(default=1.0, gt=0, description="time to first token in seconds")
    tpot_s: float = Field(default=0.1, gt=0, description="time per output token after it in seconds")


class DeployFile(Strict):
    """`specs/deploy/NAME.yaml`, or a file of your own: one deployment of one model."""

    schema_: Literal["deploy/v1"] = Field(alias="schema", description="kind and version of the file")
    deploy: str = Field(
        pattern=r"^[a-z][a-z0-9_]*$",
        max_length=40,
        description="the name in commands, and of objects in Kubernetes (with `-` for `_`)",
    )
    summary: str = Field(description="one sentence")
    model: str = Field(min_length=1, description="the checkpoint folder, as the hosts see it")
    served_model_name: str | None = Field(default=None, min_length=1, description="name in the API (default: `model`)")
    hardware: str | None = Field(default=None, description="device of specs/hardware, or a .yaml file, for simulations")
    image: str = Field(
        default="sagellm:latest", min_length=1, description="container image with sagellm and the model's folder"
    )
    roles: dict[RoleName, RoleSpec] = Field(
        description="`both`, or `prefill` and `decode`, or `attention` and `ffn`; each with its workers"
    )
    mode: Literal["hybrid", "time_share", "auto", "strict"] | None = Field(
        default=None, description="mode of the scheduler (default: strict with prefill and decode workers, else hybrid)"
    )
    transport: Literal["auto", "shm", "tcp", "nixl"] = Field(
        default="auto", description="transport of KV between prefill and decode workers"
    )
    num_ubatches: int = Field(default=1, ge=1, le=4, description="micro-batches of a step")
    limits: LimitsSpec = Field(default=LimitsSpec(), description="limits of every worker")
    options: dict[str, str | int | float | bool] = Field(
        default={}, description="further options of `sagellm serve` by name, such as `dtype: bfloat16`"
    )
    ports: PortsSpec = Field(default=PortsSpec(), description="ports")
    secrets: SecretsSpec = Field(default=SecretsSpec(), description="references to secrets")
    objective: ObjectiveSpec = Field(default=ObjectiveSpec(), description="service level objective")

    @field_validator("options")
    @classmethod
    def _only_further_options(cls, options: dict[str, str | int | float | bool]) -> dict[str, str | int | float | bool]:
        for name in options:
            if not re.fullmatch(OPTION, name):
                raise BrokenRule(
                    f"'{name[:40]}' is not the name of an option",
                    "write an option of `sagellm serve` without its hyphens, such as `dtype`",
                )
            if (remedy := OWN_FIELDS.get(name.replace("-", "_").removeprefix("no_"))) is not None:
                raise BrokenRule(f"`options` must not set `{name}`", remedy)
        return options

    @field_validator("roles")
    @classmethod
    def _known_set(cls, roles: dict[RoleName, RoleSpec]) -> dict[RoleName, RoleSpec]:
        if frozenset(roles) not in ROLE_SETS:
            raise BrokenRule(
                "`roles` must be `both`, or `prefill` and `decode`, or `attention` and `ffn`, "
                f"got {', '.join(sorted(roles)) or 'none'}",
                "write one of the three sets",
            )
        return roles

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        is_strict = "prefill" in self.roles
        if self.mode is not None and (self.mode == "strict") != is_strict:
            raise BrokenRule(
                f"mode '{self.mode}' contradicts the roles {', '.join(self.roles)}",
                "mode strict requires the roles prefill and decode, and they require it; or omit `mode`",
            )
        if any(role.nodes > 1 for role in self.roles.values()) and self.secrets.cluster_key is None:
            raise BrokenRule(
                "`nodes` above 1 requires `secrets.cluster_key`, which authenticates the hosts of an engine",
                "add `secrets: {cluster_key: {name: NAME, key: KEY}}`",
            )
        return self
