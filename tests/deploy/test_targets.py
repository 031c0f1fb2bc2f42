"""Deployments printed for each target: exact texts, valid objects, and options that the commands have."""

import ast
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from kubernetes_objects import LeaderWorkerSet, NetworkPolicy, Service, read_manifests
from typer.testing import CliRunner

from sageLLM.codegen import driver
from sageLLM.runtime.cli.deploy import Target, render_target
from sageLLM.runtime.cli.deploy_file import find_placement, read_placement
from sageLLM.runtime.cli.main import app
from sageLLM.runtime.deploy.launch import API_KEY, ENGINE_KEY, KEYS, host_processes, local_processes
from sageLLM.runtime.deploy.placement import DeployError, Placement

ACCEPT = os.environ.get("SAGELLM_ACCEPT") == "1"
EXPECTED = Path(__file__).parent / "expected"
NAMES = sorted(path.stem for path in (driver.BASE_SPECS / "deploy").glob("*.yaml"))
COMMANDS: Any = typer.main.get_command(app)
HEAD = "schema: deploy/v1\ndeploy: it\nsummary: It.\nmodel: m\n"
SECRETS = "secrets: {api_key: {name: a, key: b}}\n"


def written(folder: Path, text: str) -> Placement:
    path = folder / "it.yaml"
    path.write_text(HEAD + text, encoding="utf-8")
    return read_placement(path, "it.yaml")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("tiny", "local"),
        ("attention_ffn", "local"),
        ("prefill_decode", "local"),
        ("prefill_decode", "dynamo"),
        ("prefill_decode_pods", "dynamo"),
        ("prefill_decode_pods", "kubernetes"),
        ("two_hosts", "torchrun"),
        ("two_hosts", "kubernetes"),
        ("two_hosts", "ray"),
        ("replicas_h100", "kubernetes"),
    ],
)
def test_the_text_of_a_target(name: str, target: Any) -> None:
    placement, source = find_placement(name)
    found = render_target(placement, target, source).rstrip() + "\n"
    path = EXPECTED / f"{name}.{target}.txt"
    if ACCEPT:
        path.parent.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")


def test_the_job_of_ray_is_python() -> None:
    for name in ("two_hosts", "replicas_h100"):
        placement, source = find_placement(name)
        ast.parse(render_target(placement, "ray", source))


def options_of(command: str) -> set[str]:
    return {flag for one in COMMANDS.commands[command].params for flag in (*one.opts, *one.secondary_opts)}


def command_lines(placement: Placement) -> list[list[str]]:
    """The commands of all targets that the deployment has, from `sagellm` on."""
    lines = []
    targets = ["local", "torchrun", *(["dynamo"] if all(role.nodes == 1 for role in placement.roles.values()) else [])]
    for target in targets:
        text = render_target(placement, target, "it")  # type: ignore[arg-type]
        lines += [shlex.split(line) for line in text.splitlines() if not line.startswith("#") and "sagellm" in line]
    for one in read_manifests(render_target(placement, "kubernetes", "it")):
        if isinstance(one, LeaderWorkerSet):
            group = one.spec.leader_worker_template
            templates = [group.worker_template, *([group.leader_template] if group.leader_template else [])]
            found = [[*pod.spec.containers[0].command, *pod.spec.containers[0].args] for pod in templates]
            lines += [line for line in found if line[0] == "sagellm"]
    return [line[line.index("sagellm") :] for line in lines]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "chat_h100"])
def test_commands_have_the_options(name: str) -> None:
    placement, _ = find_placement(name)
    for _, command, *rest in command_lines(placement):
        unknown = {word for word in rest if word.startswith("--")} - options_of(command)
        assert not unknown, (command, unknown)


def test_objects_of_a_deployment_on_several_hosts() -> None:
    placement, source = find_placement("two_hosts")
    [group, service, policy] = read_manifests(render_target(placement, "kubernetes", source))
    assert isinstance(group, LeaderWorkerSet) and isinstance(service, Service) and isinstance(policy, NetworkPolicy)
    template = group.spec.leader_worker_template
    assert (group.spec.replicas, template.size) == (1, 2)
    assert template.leader_template is not None
    leader, worker = template.leader_template, template.worker_template
    # The API is served by leaders only, and every pod may be reached by those of its deployment.
    labels = service.spec.selector.items()
    assert labels <= leader.metadata.labels.items() and not labels <= worker.metadata.labels.items()
    assert service.spec.ports[0].target_port == leader.spec.containers[0].ports[0].name
    selected = policy.spec["podSelector"]["matchLabels"].items()
    assert selected <= leader.metadata.labels.items() and selected <= worker.metadata.labels.items()
    for pod in (leader, worker):
        secrets = [one.value_from for one in pod.spec.containers[0].env if one.name == "SAGELLM_KEY"]
        assert secrets[0] is not None and secrets[0].secret_key_ref.key == "cluster-key"


def test_prefill_and_decode_workers_are_pods_of_their_own() -> None:
    placement, source = find_placement("prefill_decode_pods")
    *groups, service, _ = read_manifests(render_target(placement, "kubernetes", source))
    assert [(one.metadata.labels["sagellm/role"], one.spec.replicas) for one in groups] == [
        ("frontend", 1),
        ("prefill", 2),
        ("decode", 3),
    ]
    pods = [one.spec.leader_worker_template.worker_template for one in groups]
    labels = service.spec.selector.items()
    assert [labels <= pod.metadata.labels.items() for pod in pods] == [True, False, False]
    for pod, mode in zip(pods[1:], ("prefill", "decode"), strict=True):
        container = pod.spec.containers[0]
        assert container.args[container.args.index("--disaggregation-mode") + 1] == mode
        assert container.args[container.args.index("--kv-host") + 1] == "$(POD_IP)"
        names = {one.name for one in container.env}
        assert names >= {"POD_IP", "SAGELLM_KEY", "ETCD_ENDPOINTS"}


def test_devices_are_resources(tmp_path: Path) -> None:
    placement = written(tmp_path, "roles: {both: {count: 3, tp: 4, device: cuda}}\n" + SECRETS)
    group = read_manifests(render_target(placement, "kubernetes", "it"))[0]
    container = group.spec.leader_worker_template.worker_template.spec.containers[0]
    assert group.spec.replicas == 3 and container.resources.limits["nvidia.com/gpu"] == "4"


def test_texts_of_a_spec_stay_texts(tmp_path: Path) -> None:
    """Neither the YAML of a manifest nor Kubernetes' variables nor a shell take a model's name apart."""
    hostile = "$(HOME)/a b\"'\n- c: {d}"
    text = f"roles: {{both: {{}}}}\noptions: {{chat_template: {json.dumps(hostile)}}}\n"
    placement = written(tmp_path, text + SECRETS)
    group = read_manifests(render_target(placement, "kubernetes", "it"))[0]
    arguments = group.spec.leader_worker_template.worker_template.spec.containers[0].args
    assert arguments[arguments.index("--chat-template") + 1] == hostile.replace("$(", "$$(")
    line = render_target(placement, "local", "it").partition("\n")[2]
    assert hostile in shlex.split(line)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("attention: {tp: 2}, ffn: {}", "it: attention and FFN workers have one device each; set `tp: 1` and `pp: 1`"),
        (
            "prefill: {device: cuda}, decode: {}",
            "prefill and decode workers in processes run on CPUs; set `device: cpu`",
        ),
        ("prefill: {}, decode: {pp: 2}", "prefill and decode workers have one stage and no expert parallelism"),
        ("attention: {pp: 2, nodes: 2}, ffn: {}", "workers of an engine are on one host; set `nodes: 1` and one host"),
    ],
)
def test_a_deployment_that_no_engine_has_is_refused(tmp_path: Path, roles: str, message: str) -> None:
    secrets = "secrets: {cluster_key: {name: a, key: b}}\n"
    with pytest.raises(DeployError, match=message):
        render_target(written(tmp_path, f"roles: {{{roles}}}\n{secrets}"), "local", "it")


def test_pods_that_copy_kv_require_a_key_and_one_device(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="workers that copy KV between pods require"):
        render_target(written(tmp_path, "roles: {prefill: {}, decode: {}}\ntransport: tcp\n"), "kubernetes", "it")
    placement = written(tmp_path, "roles: {prefill: {tp: 2}, decode: {}}\ntransport: tcp\n")
    with pytest.raises(DeployError, match="that are engines run on one CPU device; set `tp: 1`"):
        render_target(placement, "dynamo", "it")


def test_a_worker_of_dynamo_is_on_one_host() -> None:
    placement, source = find_placement("two_hosts")
    with pytest.raises(DeployError, match="two_hosts: a worker of Dynamo is on one host; set `nodes: 1`"):
        render_target(placement, "dynamo", source)


def test_hosts_of_an_engine_require_a_common_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)it.yaml:1:1: error.SAGE013.: `nodes` above 1 requires.*= help: add"):
        written(tmp_path, "roles: {both: {pp: 2, nodes: 2}}\n")


def test_commands_of_hosts_do_not_run_without_their_keys() -> None:
    placement, _ = find_placement("two_hosts")
    leader, other = host_processes(placement)
    for process, names in ((leader, [ENGINE_KEY, API_KEY]), (other, [ENGINE_KEY])):
        line = process.line.replace(shlex.join(process.command), "echo it ran")
        for missing in names:
            given = {name: "some key" for name in names if name != missing}
            done = subprocess.run(["sh", "-c", line], env=given, capture_output=True, text=True)
            assert done.returncode != 0 and f"{missing}: {KEYS[missing]}" in done.stderr and not done.stdout
        assert subprocess.run(["sh", "-c", line], env=dict.fromkeys(names, "k"), capture_output=True).stdout


def test_a_server_that_only_its_host_reaches_needs_no_key(tmp_path: Path) -> None:
    local = written(tmp_path, "roles: {both: {tp: 2, hosts: [localhost]}}\n")
    assert [one.keys for one in host_processes(local)] == [()]
    assert not any(one.keys for one in local_processes(local))


def test_a_job_of_ray_does_not_start_without_its_keys(tmp_path: Path) -> None:
    modules = {"ray": "", "ray/util": "", "ray/util/placement_group": "placement_group = None\n"}
    modules["ray/util/scheduling_strategies"] = "PlacementGroupSchedulingStrategy = None\n"
    for name, text in modules.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text + "remote = lambda **options: lambda cls: cls\n")
    (tmp_path / "job.py").write_text(render_target(*_named("replicas_h100", "ray")))
    done = subprocess.run([sys.executable, "job.py"], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: set SAGELLM_API_KEY in the environment of the job\n")


def _named(name: str, target: Target) -> tuple[Placement, Target, str]:
    placement, source = find_placement(name)
    return placement, target, source


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        (
            "prefill_decode_pods",
            "Dynamo's frontend reads no keys; pods with the label `sagellm/client: prefill-decode-pods` reach it: "
            "let a gateway there check keys",
        ),
        ("replicas_h100", None),
    ],
)
def test_pods_with_an_open_api_are_printed_with_a_warning(name: str, warning: str | None) -> None:
    done = CliRunner().invoke(app, ["deploy", name, "--target", "kubernetes"])
    assert done.exit_code == 0
    assert done.stderr == ("" if warning is None else f"warning: {name}: {warning}\n")


def test_pods_without_a_key_of_the_api_are_refused(tmp_path: Path) -> None:
    placement = written(tmp_path, "roles: {both: {}}\n")
    with pytest.raises(
        DeployError, match=r"it: every pod reaches the API, which requires a key; add `secrets: .api_key"
    ):
        render_target(placement, "kubernetes", "it")


def test_only_pods_with_a_label_reach_a_frontend_without_keys() -> None:
    placement, source = find_placement("prefill_decode_pods")
    *_, policy = read_manifests(render_target(placement, "kubernetes", source))
    assert all("from" in rule for rule in policy.spec["ingress"])
    sources = [one["podSelector"]["matchLabels"] for rule in policy.spec["ingress"] for one in rule["from"]]
    name = "prefill-decode-pods"
    assert sources == [{"app.kubernetes.io/name": name}, {"sagellm/client": name}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("host: 0.0.0.0", "`options` must not set `host`"),
        ("uds: /tmp/socket", "`options` must not set `uds`"),
        ("api_key: secret", "`options` must not set `api_key`"),
        ("api-key: secret", "`options` must not set `api-key`"),
        ("'api-key=secret': true", "'api-key=secret' is not the name of an option"),
        ("kv-host: 0.0.0.0", "`options` must not set `kv-host`"),
        ("tensor_parallel_size: 2", "`options` must not set `tensor_parallel_size`"),
    ],
)
def test_options_that_another_field_sets_are_refused(tmp_path: Path, options: str, message: str) -> None:
    """An option after those of the target would replace them: an address that all hosts reach, or a key in a file."""
    with pytest.raises(ValueError, match=rf"(?s)error.SAGE013.: {message}.*= help: (omit it|write)"):
        written(tmp_path, f"roles: {{both: {{}}}}\noptions: {{{options}}}\n")


def test_a_file_that_is_missing_and_a_name_that_is_unknown() -> None:
    with pytest.raises(
        ValueError, match=r"no.yaml: expected a deploy file, got no such file; `sagellm new deploy NAME`"
    ):
        find_placement("no.yaml")
    with pytest.raises(ValueError, match=r"expected a .yaml file or one of attention_ffn, .*, got nowhere"):
        find_placement("nowhere")


def test_a_spec_of_another_kind_is_named_before_its_contents(tmp_path: Path) -> None:
    path = tmp_path / "dims.yaml"
    path.write_text("schema: dims/v1\ndims: {}\n")
    with pytest.raises(ValueError, match=r"dims.yaml:1:9: error\[SAGE014\]: expected `schema: deploy/v1`, got dims/v1"):
        read_placement(path, "dims.yaml")


def test_a_new_deployment_can_be_printed(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["new", "deploy", "mine", "--specs", str(tmp_path)])
    assert done.exit_code == 0, done.output
    placement, source = find_placement(str(tmp_path / "deploy" / "mine.yaml"))
    assert "sagellm serve path/to/checkpoint --max-model-len 4096" in render_target(placement, "local", source)
