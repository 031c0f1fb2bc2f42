"""LeaderWorkerSets of a deployment, as the templates of the manifests read them."""

from collections.abc import Mapping
from dataclasses import dataclass

from sageLLM.runtime.deploy.dynamo import frontend_command, has_engine_per_worker, worker_command
from sageLLM.runtime.deploy.launch import engines, flags, server_options
from sageLLM.runtime.deploy.placement import DeployError, Placement, Resources, Role, Secret

ALL_ADDRESSES = "0.0.0.0"
"""Of a pod, which the Service reaches."""
ETCD = {"ETCD_ENDPOINTS": "http://etcd:2379", "DYN_EVENT_PLANE": "zmq"}
"""Dynamo's discovery by the Service `etcd` of the namespace, and events without NATS."""


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable: a value, that of a Secret, or a field of the pod."""

    name: str
    secret: Secret | None = None
    value: str = ""
    field: str = ""


@dataclass(frozen=True, slots=True)
class Pod:
    """The container of a pod: its command line, variables, and the port of the API if it has one."""

    arguments: tuple[str, ...]
    variables: tuple[Variable, ...]
    port: int | None = None
    ready_path: str = "/readyz"
    live_path: str = "/livez"


@dataclass(frozen=True, slots=True)
class LeaderWorkerSet:
    """Groups of pods, one group per engine: the leader, and `size` - 1 workers with the other ranks.

    A group of Dynamo's frontend or of one of its workers is one pod.

    `resources` are the requests and limits of each pod.
    """

    name: str
    role: str
    replicas: int
    size: int
    leader: Pod
    worker: Pod | None
    resources: Mapping[str, str]
    shared_memory: str

    @property
    def pods(self) -> list[tuple[str, str, Pod]]:
        """The templates of the pods: the field, the part in the group, and the pod. A leader may be the only one."""
        if self.worker is None:
            return [("workerTemplate", "leader", self.leader)]
        return [("leaderTemplate", "leader", self.leader), ("workerTemplate", "worker", self.worker)]


@dataclass(frozen=True, slots=True)
class Manifests:
    """Everything that a deployment needs in a cluster.

    Without a key of the API only pods with the label `sagellm/client: NAME` reach it, such as a gateway with keys.
    """

    name: str
    image: str
    port: int
    sets: tuple[LeaderWorkerSet, ...]
    has_api_key: bool = True

    @property
    def api_role(self) -> str:
        """The role with the API."""
        return next(one.role for one in self.sets if one.leader.port is not None)


def manifests(placement: Placement) -> Manifests:
    """The manifests of a deployment. Raises DeployError for one that cannot run there."""
    if has_engine_per_worker(placement):
        sets = _sets_of_roles(placement)
        return Manifests(placement.object_name, placement.image, placement.http_port, sets, has_api_key=False)
    if placement.api_key is None:
        raise DeployError(
            f"{placement.name}: every pod reaches the API, which requires a key; add "
            "`secrets: {api_key: {name: NAME, key: KEY}}`"
        )
    found = engines(placement)
    role, options = found[0]  # engines of a role differ in their ports only, and each pod has its own
    return Manifests(
        placement.object_name, placement.image, placement.http_port, (_set(placement, role, options, len(found)),)
    )


def why_open(placement: Placement) -> str | None:
    """The pods that reach the API without a key, or None; Dynamo's frontend reads no keys."""
    if not has_engine_per_worker(placement):
        return None
    label = f"sagellm/client: {placement.object_name}"
    return f"Dynamo's frontend reads no keys; pods with the label `{label}` reach it: let a gateway there check keys"


def _set(placement: Placement, role: Role, options: Mapping[str, object], num_engines: int) -> LeaderWorkerSet:
    serve = _plain("sagellm", "serve", placement.model, *flags(options))
    server = _plain(*flags(server_options(placement, ALL_ADDRESSES, placement.http_port)))
    variables = [Variable("SAGELLM_API_KEY", placement.api_key)]
    worker = None
    if role.nodes > 1:
        if placement.cluster_key is None:
            raise DeployError(f"{placement.name}: `nodes` above 1 requires `secrets.cluster_key`")
        key = Variable("SAGELLM_KEY", placement.cluster_key)
        variables.append(key)
        # The controller of LeaderWorkerSets sets these variables.
        hosts: tuple[str, ...] = (
            *("--nnodes", "$(LWS_GROUP_SIZE)", "--master-addr", "$(LWS_LEADER_ADDRESS)"),
            *("--master-port", str(placement.engine_port)),
        )
        serve = (*serve, *hosts, "--node-rank", "0")
        worker = Pod(("sagellm", "worker", *hosts, "--node-rank", "$(LWS_WORKER_INDEX)"), (key,))
    devices = sum(one.num_devices for one in placement.roles.values()) if role.name != "both" else role.devices_per_host
    return LeaderWorkerSet(
        name=f"{placement.object_name}-{role.name}",
        role=role.name,
        replicas=num_engines,
        size=role.nodes,
        leader=Pod((*serve, *server), tuple(variables), placement.http_port),
        worker=worker,
        resources=_resources(role.resources, role, devices),
        shared_memory=role.resources.shared_memory,
    )


def _sets_of_roles(placement: Placement) -> tuple[LeaderWorkerSet, ...]:
    """Dynamo's frontend, and the workers of each role, found by etcd."""
    key = placement.cluster_key
    if key is None:
        raise DeployError(
            f"{placement.name}: workers that copy KV between pods require `secrets.cluster_key`; add it, or set "
            "`transport: shm`"
        )
    discovery = tuple(Variable(name, value=value) for name, value in ETCD.items())
    api = Pod(frontend_command(placement, "etcd", ALL_ADDRESSES), discovery, placement.http_port, "/health", "/live")
    own = (*discovery, Variable("POD_IP", field="status.podIP"), Variable("SAGELLM_KEY", key))
    where = ("--discovery-backend", "etcd", "--kv-host", "$(POD_IP)")
    found = [_pods(placement, "frontend", 1, api, Resources())]
    for role in placement.roles.values():
        worker = Pod((*_plain(*worker_command(placement, role)), *where), own)
        found.append(_pods(placement, role.name, role.count, worker, role.resources))
    return tuple(found)


def _pods(placement: Placement, role: str, count: int, pod: Pod, resources: Resources) -> LeaderWorkerSet:
    """Groups of one pod each."""
    name, wanted = f"{placement.object_name}-{role}", {"cpu": resources.cpu, "memory": resources.memory}
    return LeaderWorkerSet(name, role, count, 1, pod, None, wanted, resources.shared_memory)


def _resources(wanted: Resources, role: Role, num_devices: int) -> dict[str, str]:
    found = {"cpu": wanted.cpu, "memory": wanted.memory}
    return found | ({wanted.accelerator: str(num_devices)} if role.device == "cuda" else {})


def _plain(*arguments: str) -> tuple[str, ...]:
    """Arguments in which Kubernetes replaces nothing: it reads $(NAME) as a variable, and $$ as $."""
    return tuple(argument.replace("$(", "$$(") for argument in arguments)
