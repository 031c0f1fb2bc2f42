"""Ranks on several hosts, over loopback: a second host by `sagellm worker`, and hosts that are refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sageLLM import LLM
from sageLLM.runtime.engine.arguments import choose_node
from sageLLM.runtime.errors import EngineError, SageError
from sageLLM.runtime.transport.channel import connect, interface_of, read_key
from sageLLM.runtime.worker import node as node_module
from sageLLM.runtime.worker.cluster import Cluster
from sageLLM.runtime.worker.node import Node, serve_node

from .test_processes import MODEL, PARAMS, PROMPTS, after_tokens, assert_ended, assert_same, load, process_ids

KEY = "a key for the tests of hosts"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_KEY", KEY)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def worker(port: int, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The second host, in the folder `tmp_path`."""
    options = ["--nnodes", "2", "--node-rank", "1", "--master-port", str(port)]
    command = [sys.executable, "-m", "sageLLM.runtime.cli.entry", "worker", *options]
    with subprocess.Popen(command, env={**os.environ, "SAGELLM_KEY": KEY}, cwd=tmp_path) as process:
        yield process
        process.kill()


def workers_of(host: int) -> list[int]:
    """The worker processes of a host: the children of its fork server."""
    return [worker for server in children_of(host) for worker in children_of(server)]


def children_of(process_id: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


def test_stages_on_two_hosts(port: int, worker: subprocess.Popen[bytes]) -> None:
    expected = load().generate(PROMPTS, PARAMS)
    llm = load(pipeline_parallel_size=2, nnodes=2, master_port=port)
    assert_same(llm.generate(PROMPTS, PARAMS), expected)
    own, (remote,) = process_ids(llm), workers_of(worker.pid)
    assert len(own) == 1
    found = after_tokens(llm, 10, lambda: os.kill(remote, signal.SIGKILL))
    assert_same(found, expected)
    started = [*process_ids(llm), *workers_of(worker.pid)]
    assert len({*started, *own, remote}) == 4
    llm.close()
    assert worker.wait(20) == 0
    assert_ended([*started, *own, remote])


def test_hosts_with_different_checkpoints(
    port: int, worker: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is another checkpoint on the other host; its config differs in a number that shapes hide."""
    shutil.copytree(MODEL, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 1e-3}))
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "model").symlink_to(MODEL)
    monkeypatch.chdir(tmp_path / "engine")
    message = r"rank 1 on node 1 \(127.0.0.1\) differs from rank 0: config.json: \w+ and \w+; all ranks must agree"
    with pytest.raises(EngineError, match=message):
        LLM("model", tensor_parallel_size=2, nnodes=2, master_port=port)
    assert worker.wait(20) == 0
    assert_free(port)


def in_thread(errors: list[BaseException], node: Node) -> threading.Thread:
    def run() -> None:
        try:
            serve_node(node, seconds=5)
        except SageError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_host_that_is_missing_is_named(port: int) -> None:
    message = rf"node 1, 2 of 3 has not connected to 127.0.0.1:{port} within 0 s; start it with `sagellm worker"
    with pytest.raises(EngineError, match=message):
        Cluster(Node(3, 0, "127.0.0.1", port), 3, seconds=0.1)
    assert_free(port)


def assert_free(port: int) -> None:
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_hosts_that_are_refused(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a wrong key, nor wrong numbers, nor another version disturb the host that belongs to the engine."""
    errors: list[BaseException] = []
    found: list[Cluster] = []
    engine = threading.Thread(target=lambda: found.append(Cluster(Node(2, 0, "127.0.0.1", port), 2, seconds=60)))
    engine.start()
    with pytest.raises(SageError, match="was not accepted: it has closed the connection; set the same key"):
        connect("127.0.0.1", port, b"another key of enough length", 5)
    connection = connect("127.0.0.1", port, KEY.encode(), 5)
    connection.send_bytes(b"not a message")
    with pytest.raises(EOFError):
        connection.recv_bytes()
    with socket.create_connection(("127.0.0.1", port)) as stream:
        stream.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(SageError, match="refused this host: it has nnodes=3, the engine has nnodes=2"):
        serve_node(Node(3, 1, "127.0.0.1", port), 5)
    with pytest.raises(SageError, match="node_rank must be 1 to 1, got 2"):
        serve_node(Node(2, 2, "127.0.0.1", port), 5)
    monkeypatch.setattr(node_module, "versions", lambda: {"sagellm": "0.0.7"})
    with pytest.raises(SageError, match=r"the engine and the host differ: sagellm: 0.1.0 and 0.0.7; generated code: "):
        serve_node(Node(2, 1, "127.0.0.1", port), 5)
    monkeypatch.undo()
    monkeypatch.setenv("SAGELLM_KEY", KEY)
    thread = in_thread(errors, Node(2, 1, "127.0.0.1", port))
    engine.join(60)
    (cluster,) = found
    assert [host.node_rank for host in cluster.hosts.values()] == [1]
    cluster.close()
    thread.join(10)
    assert not errors and not thread.is_alive()


def test_a_second_engine_and_a_second_host_with_the_same_key(port: int) -> None:
    errors: list[BaseException] = []
    found: list[Cluster] = []
    engine = threading.Thread(target=lambda: found.append(Cluster(Node(3, 0, "127.0.0.1", port), 3, seconds=60)))
    engine.start()
    threads = [in_thread(errors, Node(3, 1, "127.0.0.1", port)) for _ in range(2)]
    while not errors:  # either of the two is refused
        time.sleep(0.01)
    assert "node 1 is connected already, from 127.0.0.1" in str(errors.pop())
    with pytest.raises(SageError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
        Cluster(Node(3, 0, "127.0.0.1", port), 3, seconds=60)
    threads.append(in_thread(errors, Node(3, 2, "127.0.0.1", port)))
    engine.join(60)
    found[0].close()
    for thread in threads:
        thread.join(10)
    assert not errors and not any(thread.is_alive() for thread in threads)


def test_a_port_in_use(port: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(
            SageError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another"
        ):
            load(tensor_parallel_size=2, nnodes=2, master_port=port)


def test_an_engine_that_does_not_start(port: int) -> None:
    with pytest.raises(SageError, match=f"cannot reach the engine at 127.0.0.1:{port} within 0 s: .*refused"):
        serve_node(Node(2, 1, "127.0.0.1", port), 0.1)


def test_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("SAGELLM_KEY", "short")
    with pytest.raises(SageError, match="a shared key of at least 16 characters, got 5; set SAGELLM_KEY"):
        read_key()
    monkeypatch.delenv("SAGELLM_KEY")
    monkeypatch.setenv("SAGELLM_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(SageError, match="cannot read the key of the hosts"):
        read_key()
    (tmp_path / "key").write_text("x" * 20 + "\n")
    assert read_key() == b"x" * 20


def test_arguments_and_variables_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_node(None, None, None, None, 2) is None
    assert choose_node(2, 1, "10.0.0.1", None, 2) == Node(2, 1, "10.0.0.1", 29501)
    with pytest.raises(SageError, match="node_rank must be an integer from 0 to nnodes - 1 = 1, got 2"):
        choose_node(2, 2, None, None, 2)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "5000"}.items():
        monkeypatch.setenv(name, value)
    assert choose_node(None, None, None, None, 2) == Node(2, 1, "host", 5000)
    assert choose_node(None, None, None, None, 1) is None, "another program's variables"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert choose_node(None, None, None, None, 2) == Node(2, 1, "host", 5001)
    for name, value in (("RANK", "first"), ("MASTER_PORT", "")):
        with monkeypatch.context() as patch, pytest.raises(SageError, match=f"variable {name} of torchrun"):
            patch.setenv(name, value)
            choose_node(None, None, None, None, 2)
    with pytest.raises(SageError, match="master_port must be an integer from 1 to 65535, got 70000"):
        choose_node(2, 0, None, 70000, 2)
    with pytest.raises(SageError, match=r"nnodes=2 must divide tensor_parallel_size . pipeline_parallel_size = 3"):
        choose_node(2, 0, None, None, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="the interfaces of Linux")
def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") is None
