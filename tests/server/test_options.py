"""Options of `sagellm serve`: the command line, the environment and a file, in this order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sageLLM.runtime.cli import serve
from sageLLM.runtime.cli.engine_options import EngineOptions
from sageLLM.runtime.cli.main import app
from sageLLM.runtime.cli.serve_engine import EngineSpec, decode_spec, encode_spec
from sageLLM.runtime.server.http_server import bind, why_open
from sageLLM.runtime.server.settings import ServerSettings


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Any:
    """given(arguments, **environment) -> the settings and engine options that the command got."""
    found: list[tuple[ServerSettings, EngineOptions]] = []

    def serve_model(settings: ServerSettings, engine: EngineOptions) -> int:
        found.append((settings, engine))
        return 0

    monkeypatch.setattr(serve, "serve_model", serve_model)

    def run(*arguments: str, **environment: str) -> tuple[ServerSettings, EngineOptions]:
        done = CliRunner().invoke(app, ["serve", *arguments], env=environment)
        assert done.exit_code == 0, done.output
        return found[-1]

    return run


def test_defaults(given: Any) -> None:
    assert given("folder") == (ServerSettings(model="folder"), EngineOptions())


def test_precedence(given: Any, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("port: 1\nhost: here\nmax-num-seqs: 7\nmax_model_len: 32k\napi-key: [a, b]\nlenient: true\n")
    settings, engine = given("folder", "--config", str(path), "--port", "3", SAGELLM_PORT="2", SAGELLM_HOST="there")
    assert (settings.port, settings.host, settings.api_key, settings.lenient) == (3, "there", ["a", "b"], True)
    assert (engine.max_num_seqs, engine.max_model_len) == (7, 32000)
    settings, engine = given("folder", SAGELLM_MAX_NUM_SEQS="9", SAGELLM_API_KEY="one")
    assert (engine.max_num_seqs, settings.api_key) == (9, ["one"])


def test_lists_repeat_or_are_json(given: Any) -> None:
    assert given("f", "--served-model-name", "a", "--served-model-name", "b")[0].model_names == ["a", "b"]
    assert given("f", "--allowed-origins", '["*"]')[0].allowed_origins == ["*"]


def test_an_unknown_name_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("prot: 1\n")
    done = CliRunner().invoke(app, ["serve", "folder", "--config", str(path)], env={"COLUMNS": "300"})
    assert done.exit_code == 2 and "unknown option 'prot'; did you mean 'port'?" in done.output


def test_the_front_loads_no_torch() -> None:
    """Half a second of start, and 200 MB."""
    code = (
        "import sys, sageLLM.runtime.cli.serve, sageLLM.runtime.server.http_server as h; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_spec_of_the_engine_process_survives_the_channel() -> None:
    spec = EngineSpec("m", EngineOptions(plugins=[Path("a")], disk_folder=Path("b"), max_model_len=5))
    assert decode_spec(encode_spec(spec)) == spec


def test_an_invalid_model_ends_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "configure_logs", lambda form, level: None)
    settings = ServerSettings(model=str(tmp_path), port=0, in_process=True)
    assert serve.serve_model(settings, EngineOptions()) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"api_key": ["a", ""]}, "api_key must not be empty"),
        ({"port": 70_000}, "port must be from 0 to 65535, got 70000"),
        ({"max_body_size": -1}, "max_body_size must be above 0, got -1"),
        ({"header_timeout": float("nan")}, "header_timeout must be above 0, got nan"),
        ({"shutdown_timeout": -1.0}, "shutdown_timeout must be at least 0, got -1"),
        ({"metrics_namespace": "a-b"}, "metrics_namespace must have letters"),
        ({"served_model_name": [""]}, "served_model_name must not be empty"),
    ],
)
def test_invalid_settings_end_with_their_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(serve, "configure_logs", lambda form, level: None)
    assert serve.serve_model(ServerSettings(model="folder", **values), EngineOptions()) == 1
    assert capsys.readouterr().err.startswith(f"error: {reason}")


def test_a_file_at_the_place_of_the_socket_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    with pytest.raises(FileExistsError, match="must be a socket or a new name"):
        bind(ServerSettings(model="folder", uds=str(path)))
    assert path.read_text() == "kept"


def test_status_lists_the_workers_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from sageLLM.runtime.cli import status
    from sageLLM.runtime.server.messages import Load, WorkerLoad
    from sageLLM.runtime.server.metrics import Metrics

    metrics = Metrics("sagellm", "tiny")
    workers = [WorkerLoad(0, "prefill", "running", 0, 2), WorkerLoad(1, "decode", "restarting", 3, 1)]
    metrics.update_load(Load(*[1] * 13, workers=[WorkerLoad(0, "prefill", "draining", 0, 9)]))
    metrics.update_load(Load(*[1] * 13, workers=workers))
    monkeypatch.setattr(status, "read_metrics", lambda url, api_key: metrics.page().decode())
    done = CliRunner().invoke(app, ["status"])
    assert done.stdout.splitlines() == [
        "requests_running: 1",
        "requests_waiting: 1",
        "worker 0: prefill  running    2 requests, epoch 0",
        "worker 1: decode   restarting 1 requests, epoch 3",
    ]


def test_status_without_a_server_is_an_error() -> None:
    done = CliRunner().invoke(app, ["status", "--url", "http://127.0.0.1:9"])
    assert done.exit_code == 1
    assert "error: cannot read the metrics of http://127.0.0.1:9" in done.stderr


@pytest.mark.parametrize(
    ("settings", "is_open"),
    [
        ({"host": "0.0.0.0"}, True),
        ({"host": "0.0.0.0", "api_key": ["secret"]}, False),
        ({"host": "127.0.0.1"}, False),
        ({"host": "localhost"}, False),
        ({"uds": "it.sock"}, False),
    ],
)
def test_a_server_that_other_hosts_reach_without_a_key_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], is_open: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = ServerSettings(model="folder", port=0, **settings)
    with bind(chosen) as sock:
        reason = why_open(chosen, sock)
    expected = "other hosts reach 0.0.0.0 without a key; set SAGELLM_API_KEY, or listen on 127.0.0.1"
    assert reason == (expected if is_open else None)
