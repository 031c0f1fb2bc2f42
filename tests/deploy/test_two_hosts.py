"""The torchrun commands of a deployment on two hosts, which are network namespaces here."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from namespaces import Host, two_hosts, why_not_permitted

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.cli.deploy_file import find_placement
from sageLLM.runtime.deploy.launch import Process, host_processes

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "sagellm": [sys.executable, "-m", "sageLLM.runtime.cli.entry"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
}
ASK = """
import json, sys, time, urllib.request
body = json.dumps({"prompt": "def main(", "max_tokens": 12, "temperature": 0}).encode()
for _ in range(3000):
    try:
        urllib.request.urlopen(sys.argv[1] + "/readyz")
        break
    except OSError:
        time.sleep(0.1)
print(urllib.request.urlopen(urllib.request.Request(sys.argv[1] + "/v1/completions", body)).read().decode())
"""


def start(process: Process, host: Host) -> "subprocess.Popen[bytes]":
    command = [part for word in process.command for part in PROGRAMS.get(word, [word])]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "_dev"),
        "SAGELLM_KEY": "the key of both hosts",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen([*host.prefix, *command], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)


def ended(processes: "list[subprocess.Popen[bytes]]", seconds: float = 20.0) -> list[int | None]:
    deadline = time.monotonic() + seconds
    while any(one.poll() is None for one in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [one.poll() for one in processes]


WHY_NOT = why_not_permitted() if os.environ.get("SAGELLM_TWO_HOSTS") else "`make two-hosts` runs it"


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_two_stages_answer_as_one_process_does() -> None:
    placement, _ = find_placement("two_hosts")
    expected = LLM(ROOT / placement.model).generate("def main(", SamplingParams(max_tokens=12, temperature=0))
    with two_hosts() as hosts:
        role = replace(placement.roles["both"], hosts=tuple(host.address for host in hosts))
        commands = host_processes(replace(placement, roles={"both": role}))
        assert [one.host for one in commands] == [host.address for host in hosts]
        processes = [start(one, host) for one, host in zip(commands, hosts, strict=True)]
        try:
            url = f"http://{hosts[0].address}:{placement.http_port}"
            asked = subprocess.run([*hosts[1].prefix, sys.executable, "-c", ASK, url], capture_output=True, check=True)
            assert json.loads(asked.stdout)["choices"][0]["text"] == expected[0].outputs[0].text
            processes[0].terminate()
            assert None not in ended(processes), "a host is left"
        finally:
            for one in processes:
                one.kill()
                one.wait()
