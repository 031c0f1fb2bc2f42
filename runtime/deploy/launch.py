"""Command lines of a deployment's processes."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sageLLM.runtime.deploy.placement import LOCAL_HOST, DeployError, Placement, Role, is_loopback

TRANSPORTS = {"shm": "shared_memory", "tcp": "tcp", "nixl": "nixl"}
"""Transports of a deployment, and the values of `--kv-transport`."""
ENGINE_KEY, API_KEY = "SAGELLM_KEY", "SAGELLM_API_KEY"
KEYS: Mapping[str, str] = {
    ENGINE_KEY: "set it to a key that all hosts of an engine have",
    API_KEY: "set it to the key of the API, which other hosts reach",
}
"""Variables of the environment with keys, and what their absence asks for."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process: its name, its host, the command line, and the environment besides the inherited one.

    `keys` are variables with keys, which the inherited environment must have; no text of a deployment contains one.
    """

    name: str
    host: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The command line for a shell, which does not run it without the keys."""
        checks = [f': "${{{name}:?{KEYS[name]}}}" &&' for name in self.keys]
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*checks, *variables, shlex.join(self.command)])


def flags(options: Mapping[str, object]) -> list[str]:
    """Options as flags, in order: true is the bare flag, false `--no-...`, None is left out."""
    found: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value is True or value is False:
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found += [f"--{flag}", str(value)]
    return found


def engine_options(placement: Placement, role: Role) -> dict[str, object]:
    """Options of an engine of this role's workers, by name; those of the server and of the hosts are separate."""
    options: dict[str, object] = {}
    if role.device != "cpu":
        options["device"] = role.device
    if placement.mode is not None and role.name == "both":
        options["pd"] = placement.mode
    if placement.mode == "auto":
        options |= {"slo_ttft": placement.ttft_s, "slo_tpot": placement.tpot_s}
    if role.tp > 1:
        options["tensor_parallel_size"] = role.tp
    if role.pp > 1:
        options["pipeline_parallel_size"] = role.pp
    if role.ep > 1:
        options["enable_expert_parallel"] = True
    if placement.num_ubatches > 1:
        options["num_ubatches"] = placement.num_ubatches
    return options | dict(placement.limits_of(role))


def server_options(placement: Placement, host: str | None, port: int) -> dict[str, object]:
    """Options of the server of an engine; the host is None where it is added later."""
    name = placement.served_model_name
    named = {"served_model_name": name} if name is not None else {}
    return {**named, "host": host, "port": port, **placement.options}


def serve_command(placement: Placement, options: Mapping[str, object], host: str, port: int) -> tuple[str, ...]:
    """`sagellm serve` of an engine with these options."""
    return ("sagellm", "serve", placement.model, *flags(options), *flags(server_options(placement, host, port)))


def engines(placement: Placement) -> list[tuple[Role, dict[str, object]]]:
    """The engines that are servers of their own: the role that says how large each is, and its options.

    One for each worker of the role `both`. Prefill and decode workers, and attention and FFN workers, belong to one
    engine, which divides the requests among them.
    """
    roles = placement.roles
    if "both" in roles:
        role = roles["both"]
        return [(role, engine_options(placement, role)) for _ in range(role.count)]
    first, second = ("prefill", "decode") if placement.is_disaggregated else ("attention", "ffn")
    return [_of_two_roles(placement, roles[first], roles[second])]  # type: ignore[index]


def _of_two_roles(placement: Placement, first: Role, second: Role) -> tuple[Role, dict[str, object]]:
    if why := why_not_one_engine(first, second):
        raise DeployError(f"{placement.name}: {why}")
    if first.name == "attention":
        options = engine_options(placement, first) | dict(placement.limits_of(second))
        return first, options | {"af": f"{first.count}:{second.count}"}
    shared = engine_options(placement, replace(first, tp=1, ep=1)) | dict(placement.limits_of(second))
    return first, shared | pd_options(placement, first, second)


def pd_options(placement: Placement, prefill: Role, decode: Role) -> dict[str, object]:
    """Options of an engine with prefill and decode workers in processes."""
    options: dict[str, object] = {"pd": "strict", "prefill_workers": prefill.count, "decode_workers": decode.count}
    for role in (prefill, decode):
        if role.tp > 1:
            options[f"{role.name}_tensor_parallel_size"] = role.tp
    if placement.transport != "auto":
        options["kv_transport"] = TRANSPORTS[placement.transport]
    return options


def why_not_one_engine(first: Role, second: Role) -> str | None:
    """The reason why one engine cannot have the workers of both roles, or None."""
    for role in (first, second):
        if role.nodes > 1 or len(set(role.hosts)) > 1:
            return (
                f"the {first.name} and {second.name} workers of an engine are on one host; set `nodes: 1` and one host"
            )
    if first.name == "attention" and first.devices_per_worker * second.devices_per_worker > 1:
        return "attention and FFN workers have one device each; set `tp: 1` and `pp: 1`"
    if first.name == "prefill" and max(first.pp, first.ep, second.pp, second.ep) > 1:
        return "prefill and decode workers have one stage and no expert parallelism; set `pp: 1` and `ep: 1`"
    if first.name == "prefill" and first.device != "cpu":
        return "prefill and decode workers in processes run on CPUs; set `device: cpu`, or use the role `both`"
    return None


def local_processes(placement: Placement) -> list[Process]:
    """All processes on this machine."""
    found: list[Process] = []
    for number, (role, options) in enumerate(engines(placement)):
        for node in range(role.nodes):
            nodes = _node_options(placement, role, LOCAL_HOST, node, number)
            command = serve_command(placement, options | nodes, LOCAL_HOST, placement.http_port + number)
            found.append(Process(_name(role, number, node), LOCAL_HOST, command))
    return found


def host_processes(placement: Placement) -> list[Process]:
    """The commands of each host: torchrun for engines with ranks, else the server itself."""
    found: list[Process] = []
    for number, (role, options) in enumerate(engines(placement)):
        port = placement.http_port + _num_before(role, number)
        for node in range(role.nodes):
            host = role.host(number, 0) if node == 0 else LOCAL_HOST
            serve = serve_command(placement, options, host, port)
            prefix = torchrun(placement, role, number, node) if role.devices_per_worker > 1 else ()
            keys = (*([ENGINE_KEY] if role.nodes > 1 else []), *([] if is_loopback(host) else [API_KEY]))
            found.append(Process(_name(role, number, node), role.host(number, node), (*prefix, *serve), keys=keys))
    return found


def torchrun(placement: Placement, role: Role, worker: int, node: int) -> tuple[str, ...]:
    """The start of the command on a host of an engine: one process per rank."""
    options = {
        "nnodes": role.nodes,
        "nproc-per-node": role.devices_per_host,
        "node-rank": node,
        "master-addr": role.host(worker, 0),
        "master-port": placement.engine_port + 2 * _num_before(role, worker),  # the engine listens on the next one
    }
    return ("torchrun", *flags(options), "--no-python")


def _num_before(role: Role, worker: int) -> int:
    """Workers before this one with the same first host, whose ports are taken."""
    return sum(role.host(other, 0) == role.host(worker, 0) for other in range(worker))


def _node_options(placement: Placement, role: Role, address: str, node: int, number: int) -> dict[str, object]:
    if role.nodes == 1:
        return {}
    port = placement.engine_port + number
    return {"nnodes": role.nodes, "node_rank": node, "master_addr": address, "master_port": port}


def _name(role: Role, worker: int, node: int) -> str:
    return f"{role.name}-{worker}" + (f"-node{node}" if role.nodes > 1 else "")


def as_script(processes: Sequence[Process]) -> str:
    """The commands, each after a comment with its host."""
    return "\n".join(f"# {one.name} on {one.host}\n{one.line}" for one in processes)
