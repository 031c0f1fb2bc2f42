"""Launches ranks with torchrun, and on two hosts that are network namespaces, and compares with one process.

    python tests/parallel/launches.py [--only torchrun]

Prints a line per launch. Network namespaces require root and the command `ip`. `make launches` runs all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sageLLM import LLM, SamplingParams

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"
PROMPTS = [[10, 11, 12], [20, 21], [30 + i for i in range(40)]]
PARAMS = [
    SamplingParams(max_tokens=24, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=24, n=2, temperature=1.0, seed=3, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, top_k=40, seed=5, ignore_eos=True),
]
DEGREES = {"tp=2": {"tensor_parallel_size": 2}, "pp=2": {"pipeline_parallel_size": 2}}
SECONDS = 300
FIRST, SECOND = "10.231.0.1", "10.231.0.2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="launches with this text")
    parser.add_argument("--generate", type=json.loads, help="options of the LLM; used by the program itself")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.generate is not None:
        options.out.write_text(json.dumps(generate(**options.generate)))
        return
    expected = generate()
    failed = 0
    for name, degrees in DEGREES.items():
        for launch in (torchrun, namespaces):
            text = f"{launch.__name__} {name}"
            if options.only in text:
                with tempfile.TemporaryDirectory() as folder:
                    found = launch(Path(folder) / "answers.json", degrees)
                failed += found != expected
                print(f"{text:<24} {'equal' if found == expected else f'expected {expected}, got {found}'}", flush=True)
    sys.exit(failed > 0)


def generate(**options: Any) -> list[list[int]]:
    llm = LLM(MODEL, dtype="float32", max_model_len=128, **options)
    try:
        outputs = llm.generate(PROMPTS, PARAMS)
        return [list(answer.token_ids) for output in outputs for answer in output.outputs]
    finally:
        llm.close()


def command(out: Path, **options: Any) -> list[str]:
    return [__file__, "--out", str(out), "--generate", json.dumps(options)]


def free_ports() -> int:
    """A free port for torchrun, of which the next one is free as well, for the engine.

    They are below those that the system chooses for connections, which would take the second one now and then.
    """
    for port in range(20000, 32000, 2):
        with suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port
    raise AssertionError("two ports in a row must be free")


def torchrun(out: Path, degrees: dict[str, int]) -> Any:
    """Two processes that torchrun starts on this host; the ranks read its variables."""
    port = free_ports()
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    line = [sys.executable, *launcher, *command(out, **degrees)]
    subprocess.run(line, env={**os.environ, "SAGELLM_KEY": "a key for launches"}, check=True, timeout=SECONDS)
    return json.loads(out.read_text())


def namespaces(out: Path, degrees: dict[str, int]) -> Any:
    """The engine in one network namespace, and `sagellm worker` in another one; a virtual cable joins them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return "no network namespaces: they require root and the command ip"
    nodes: dict[str, Any] = {"nnodes": 2, "master_addr": FIRST, "master_port": 29511}
    worker = ["--nnodes", "2", "--node-rank", "1", "--master-addr", FIRST, "--master-port", "29511"]
    environment = {**os.environ, "SAGELLM_KEY": "a key for launches"}
    with two_namespaces() as (first, second):
        entry = [sys.executable, "-m", "sageLLM.runtime.cli.entry", "worker", *worker]
        with subprocess.Popen(inside(second, entry), env=environment) as other:
            try:
                line = inside(first, [sys.executable, *command(out, **degrees, **nodes)])
                subprocess.run(line, env=environment, check=True, timeout=SECONDS)
                other.wait(20)
            finally:
                other.kill()
    return json.loads(out.read_text())


def inside(namespace: str, line: list[str]) -> list[str]:
    return ["ip", "netns", "exec", namespace, *line]


@contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    """Two namespaces that reach each other at the addresses FIRST and SECOND, and nothing else."""
    names = [f"sagellm-{os.getpid()}-{i}" for i in range(2)]
    cable = [f"sage{os.getpid()}{i}"[-15:] for i in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cable[0], "netns", names[0], "type", "veth", "peer", "name", cable[1], "netns", names[1])
        for name, end, address in zip(names, cable, (FIRST, SECOND), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


if __name__ == "__main__":
    main()
