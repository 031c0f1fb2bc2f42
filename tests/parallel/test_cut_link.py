"""KV is copied over a link that is cut or slow, between real processes in a network namespace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sageLLM import LLM

from .cut_link import MODEL, OPTIONS, PARAMS, PROMPTS

ROOT = Path(__file__).parents[2]
REASON = "its KV could not be transferred to a decode worker"


def why_not_permitted() -> str | None:
    """The reason why this process cannot make a network namespace with a slow link, or None."""
    if missing := [name for name in ("unshare", "ip", "tc") if shutil.which(name) is None]:
        return f"the command {missing[0]} is missing"
    command = "ip link set lo up && tc qdisc add dev lo root tbf rate 4mbit burst 64kb latency 2s"
    done = subprocess.run(["unshare", "--net", "sh", "-c", command], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else None


pytestmark = pytest.mark.skipif(why := why_not_permitted(), reason=str(why))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "_dev")}
    return subprocess.run([*command], env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def expected() -> list[list[Any]]:
    llm = LLM(MODEL, **OPTIONS)
    answers = [llm.generate(prompts, PARAMS) for prompts in PROMPTS]
    return [[[list(one.outputs[0].token_ids), "length", None] for one in outputs] for outputs in answers]


@pytest.mark.parametrize(("policy", "seconds"), [("recompute", 1.2), ("fail", 2.5)])
def test_a_link_that_is_cut(policy: str, seconds: float, expected: list[list[Any]]) -> None:
    """The prompts are computed again, or their requests end; those after the cut are served as those before it."""
    done = run("unshare", "--net", sys.executable, str(Path(__file__).with_name("cut_link.py")), policy, str(seconds))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    before, during, after = found["answers"]
    assert [before, after] == [expected[0], expected[2]]
    if policy == "recompute":
        assert during == expected[1]
    else:
        assert [one[1:] for one in during] == [["abort", REASON]] * len(during)
    assert found["used"] == 0


def test_a_slow_link_with_kills() -> None:
    """4 Mbit/s, while a prefill or decode worker is killed now and then."""
    options = ["--requests", "12", "--kills", "2", "--throttle", "4mbit"]
    done = run(sys.executable, str(ROOT / "benchmarks" / "chaos.py"), *options)
    assert done.returncode == 0 and "2 kills" in done.stdout, done.stdout + done.stderr
    assert "0 lost, 0 duplicated, 0 differ, 0 blocks in use" in done.stdout
