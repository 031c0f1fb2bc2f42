"""Ahead-of-time compilation of the Triton kernels for GPUs; `needs/TARGET.txt` records the resources of each kernel.

The suite compiles one kernel of every kind, for two targets; `make aot` compiles all kernels for all targets, and
`make aot SAGELLM_ACCEPT=1` rewrites the files. They are valid for the version of Triton in their first line.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = pytest.mark.timeout(3600)  # all kernels, for all targets, on a busy machine

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
ALL = os.environ.get("SAGELLM_AOT") == "all"
ACCEPT = ALL and os.environ.get("SAGELLM_ACCEPT") == "1"
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"] if ALL else ["sm_90", "gfx942"]
OF_EVERY_KIND = "silu_mul,fused_add_rms_norm,rope,combine_experts,paged_prefill_attention,paged_decode_attention"
OF_EVERY_KIND += ",linear,expert_linear,topk_router,kv_store,sample,lm_head_sample"

Report = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def report() -> dict[str, Report]:
    """Registers, spills, shared memory and opcodes, by target and kernel. Triton caches the compiled kernels."""
    environ = {"TRITON_CACHE_DIR": str(ROOT / ".cache/triton"), **os.environ}
    command = [sys.executable, FOLDER / "compile_ahead.py", "all" if ALL else OF_EVERY_KIND, *TARGETS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Report] = json.loads(done.stdout)["targets"]
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled(report: dict[str, Report], target: str) -> None:
    assert {name: needs["spilled"] for name, needs in report[target].items() if needs["spilled"]} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_needs(report: dict[str, Report], target: str) -> None:
    path = FOLDER / "needs" / f"{target}.txt"
    lines = [line(name, needs) for name, needs in sorted(report[target].items())]
    if ACCEPT:
        path.write_text("\n".join([f"triton {triton.__version__}", *lines]) + "\n")
    version, *accepted = path.read_text().splitlines()
    if version != f"triton {triton.__version__}":
        pytest.skip(f"{path.name} is of {version}")
    assert set(lines) <= set(accepted) if not ALL else lines == accepted


def line(name: str, needs: dict[str, Any]) -> str:
    shared = f", {needs['shared']} bytes of shared memory" if needs["shared"] else ""
    return f"{name}: {needs['registers']} registers{shared}{', '.join(['', *needs['opcodes']])}"


def test_row_kernels_load_and_store_16_bytes_at_a_time(report: dict[str, Report]) -> None:
    for name in ("_fused_add_rms_norm_rows", "_silu_mul_kernel"):
        assert {"LDG.E.128", "STG.E.128"} <= set(report["sm_90"][name]["opcodes"])


def test_prefill_attention_uses_the_tensor_cores_of_hopper(report: dict[str, Report]) -> None:
    """wgmma, which requires tiles of at least 64 rows."""
    assert "HGMMA" in report["sm_90"]["_paged_prefill_attention_kernel"]["opcodes"]
