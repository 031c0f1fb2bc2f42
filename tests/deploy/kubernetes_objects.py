"""The fields of Kubernetes objects that the manifests may have, as strict models.

Facts of the API reference of Kubernetes 1.37 (core/v1, networking.k8s.io/v1) and of the custom resource
`leaderworkerset.x-k8s.io/v1`. `make manifests` checks the same manifests with Kubernetes' own JSON Schemas.
"""

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.alias_generators import to_camel

Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^[0-9.]+(m|[kMGT]i?)?$")]
Port = Annotated[int, Field(ge=1, le=65535)]


class Object(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Object):
    name: Label
    labels: dict[str, str]


class KeyReference(Object):
    name: Label
    key: str


class FieldReference(Object):
    field_path: Literal["status.podIP"]


class Source(Object):
    secret_key_ref: KeyReference | None = None
    field_ref: FieldReference | None = None


class Variable(Object):
    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str | None = None
    value_from: Source | None = None


class HttpGet(Object):
    path: str
    port: str


class Probe(Object):
    http_get: HttpGet
    period_seconds: int
    failure_threshold: int = 3
    timeout_seconds: int = 1


class Resources(Object):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class Capabilities(Object):
    drop: list[Literal["ALL"]]


class ContainerSecurity(Object):
    allow_privilege_escalation: Literal[False]
    read_only_root_filesystem: Literal[True]
    capabilities: Capabilities


class ContainerPort(Object):
    name: Annotated[str, Field(max_length=15)]
    container_port: Port


class Mount(Object):
    name: Label
    mount_path: str


class Container(Object):
    name: Label
    image: str
    command: list[str]
    args: list[str]
    env: list[Variable]
    ports: list[ContainerPort] = []
    startup_probe: Probe | None = None
    readiness_probe: Probe | None = None
    liveness_probe: Probe | None = None
    resources: Resources
    security_context: ContainerSecurity
    volume_mounts: list[Mount]


class SeccompProfile(Object):
    type: Literal["RuntimeDefault"]


class PodSecurity(Object):
    run_as_non_root: Literal[True]
    run_as_user: int
    fs_group: int
    seccomp_profile: SeccompProfile


class EmptyDir(Object):
    medium: Literal["Memory"] | None = None
    size_limit: Quantity | None = None


class Volume(Object):
    name: Label
    empty_dir: EmptyDir


class PodSpec(Object):
    automount_service_account_token: Literal[False]
    enable_service_links: Literal[False]
    security_context: PodSecurity
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]


class Labels(Object):
    labels: dict[str, str]


class PodTemplate(Object):
    metadata: Labels
    spec: PodSpec


class GroupTemplate(Object):
    size: Annotated[int, Field(ge=1)]
    restart_policy: Literal["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]
    leader_template: PodTemplate | None = None
    worker_template: PodTemplate


class SetSpec(Object):
    replicas: Annotated[int, Field(ge=0)]
    leader_worker_template: GroupTemplate


class LeaderWorkerSet(Object):
    api_version: Literal["leaderworkerset.x-k8s.io/v1"]
    kind: Literal["LeaderWorkerSet"]
    metadata: Metadata
    spec: SetSpec


class DeploymentSpec(Object):
    replicas: int
    selector: dict[Literal["matchLabels"], dict[str, str]]
    template: PodTemplate


class Deployment(Object):
    api_version: Literal["apps/v1"]
    kind: Literal["Deployment"]
    metadata: Metadata
    spec: DeploymentSpec


class ServicePort(Object):
    name: str
    port: Port
    target_port: str


class ServiceSpec(Object):
    selector: dict[str, str]
    ports: list[ServicePort]


class Service(Object):
    api_version: Literal["v1"]
    kind: Literal["Service"]
    metadata: Metadata
    spec: ServiceSpec


class NetworkPolicy(Object):
    api_version: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: dict[str, Any]


Manifest = Annotated[LeaderWorkerSet | Deployment | Service | NetworkPolicy, Field(discriminator="kind")]


def read_manifests(text: str) -> list[Any]:
    """The objects of a manifest. Raises ValidationError for a field or a value that they must not have."""
    adapter: TypeAdapter[Any] = TypeAdapter(Manifest)
    return [adapter.validate_python(one) for one in yaml.safe_load_all(text)]
