"""Deploy specs by name, or from a file outside the specs."""

from pathlib import Path
from typing import TYPE_CHECKING

from sageLLM.runtime.deploy.placement import Limits, Placement, Resources, Role, RoleName, Secret

if TYPE_CHECKING:
    from sageLLM.codegen.schema.deploy import DeployFile, LimitsSpec, RoleSpec, SecretSpec

SUFFIXES = (".yaml", ".yml")


def find_placement(name: str) -> tuple[Placement, str]:
    """The deployment of this name, or of this YAML file, and the file. Raises ValueError with its diagnostics."""
    from sageLLM.codegen.driver import BASE_SPECS

    if name.endswith(SUFFIXES):
        return read_placement(Path(name), name), name
    folder = BASE_SPECS / "deploy"
    path = folder / f"{name}.yaml"
    known = sorted(one.stem for one in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"expected a .yaml file or one of {', '.join(known)}, got {name}")
    display = f"specs/deploy/{name}.yaml"
    return read_placement(path, display), display


def read_placement(path: Path, display: str) -> Placement:
    """The deployment of a file. Raises ValueError with the diagnostics of the file."""
    from sageLLM.codegen.load import load_only
    from sageLLM.codegen.schema.deploy import DeployFile

    if not path.is_file():
        raise ValueError(f"{path}: expected a deploy file, got no such file; `sagellm new deploy NAME` makes one")
    spec = load_only(path, display, "deploy/v1")
    assert isinstance(spec, DeployFile), "the class of this schema"
    return placement_of(spec)


def placement_of(spec: "DeployFile") -> Placement:
    """The deployment that a checked file describes."""
    return Placement(
        name=spec.deploy,
        model=spec.model,
        roles={name: _role(name, role) for name, role in spec.roles.items()},
        summary=spec.summary,
        served_model_name=spec.served_model_name,
        hardware=spec.hardware,
        image=spec.image,
        mode=spec.mode,
        transport=spec.transport,
        num_ubatches=spec.num_ubatches,
        limits=_limits(spec.limits),
        options=spec.options,
        http_port=spec.ports.http,
        engine_port=spec.ports.engine,
        api_key=_secret(spec.secrets.api_key),
        cluster_key=_secret(spec.secrets.cluster_key),
        ttft_s=spec.objective.ttft_s,
        tpot_s=spec.objective.tpot_s,
    )


def _role(name: RoleName, spec: "RoleSpec") -> Role:
    return Role(
        name,
        count=spec.count,
        tp=spec.tp,
        pp=spec.pp,
        ep=spec.ep,
        nodes=spec.nodes,
        device=spec.device,
        hosts=tuple(spec.hosts),
        limits=_limits(spec.limits),
        resources=Resources(**spec.resources.model_dump()),
    )


def _limits(spec: "LimitsSpec") -> Limits:
    return spec.model_dump(exclude_none=True)


def _secret(spec: "SecretSpec | None") -> Secret | None:
    return None if spec is None else Secret(spec.name, spec.key)
