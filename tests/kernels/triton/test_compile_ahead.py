"""Ahead-of-time compilation of the Triton kernels for GPUs; `needs/TARGET.txt` records the resources of each kernel.

The suite compiles one kernel of every kind for sm_90, and some for gfx942; `make aot` compiles all kernels for all
targets, attention and GEMMs at many sizes, and `make aot SAGELLM_ACCEPT=1` rewrites the files. `make aot
SAGELLM_AOT=sm_90,sm_100` does so for some of the targets. The files are valid for the version of Triton in their first
line.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from sageLLM.codegen import driver

# Importing Triton here would cost a second that the tests do not need: only the other process uses it.
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux"),
    pytest.mark.timeout(3600),  # all kernels, for all targets, on a busy machine
]

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
CHOSEN = os.environ.get("SAGELLM_AOT", "")
ALL = CHOSEN != ""
ACCEPT = ALL and os.environ.get("SAGELLM_ACCEPT") == "1"
SAMPLE = {
    "sm_90": "silu_mul,fused_add_rms_norm,rope,combine_experts,paged_prefill_attention,"
    "linear_silu_mul,expert_linear,router_logits,topk_router,kv_store,sample",
    "gfx942": "fused_add_rms_norm,linear,topk_router,sample",
}
FORMS = "scan_all,top_router,i8_arithmetic,powers"
WHOLE, FEW = ["sm_80", "sm_90", "sm_100", "gfx942"], ["sm_86", "sm_89"]
"""Targets for which `make aot` compiles all kernels and many sizes, or the templates at a few sizes."""
TARGETS = ([*WHOLE, *FEW] if CHOSEN == "all" else CHOSEN.split(",")) if ALL else [*SAMPLE]

Report = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """The version of Triton; registers, spills, shared memory and opcodes of each kernel for each target.

    Each target has a process; as many run at once as there are cores.
    """
    requests = [[f"{target}:few"] if target in FEW else [f"{target}:all", f"{target}:sizes"] for target in TARGETS]
    if not ALL:
        requests = [[f"{target}:{SAMPLE[target]}" for target in TARGETS]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = [*pool.map(compiled_by, requests)]
    targets = {name: found for report in reports for name, found in report["targets"].items()}
    return {"triton": reports[0]["triton"], "targets": targets}


def compiled_by(requests: list[str]) -> dict[str, Any]:
    environ = {"TRITON_CACHE_DIR": str(ROOT / ".cache/triton"), **os.environ}  # holds the compiled kernels
    command = [sys.executable, FOLDER / "compile_ahead.py", *requests]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def report(compiled: dict[str, Any]) -> dict[str, Report]:
    found: dict[str, Report] = compiled["targets"]
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled(report: dict[str, Report], target: str) -> None:
    assert {name: needs["spilled"] for name, needs in compiled_of(report, target).items() if needs["spilled"]} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_is_within_the_limit_of_the_target(report: dict[str, Report], target: str) -> None:
    check_shared_memory(report, target)


def check_shared_memory(report: dict[str, Report], target: str) -> None:
    """A kernel that requires more compiles, but cannot be launched."""
    specs = YAML(typ="safe").load(ROOT / "specs/targets.yaml")["targets"]
    covering = next((name for name, spec in specs.items() if target in spec.get("covers", ())), target)
    limit = specs[covering]["shared_memory"]
    shared = {name: needs["shared"] for name, needs in compiled_of(report, target).items()}
    assert {name: size for name, size in shared.items() if size > limit} == {}


def compiled_of(report: dict[str, Report], target: str) -> Report:
    """The kernels, without the cases that run their reference."""
    return {name: needs for name, needs in report[target].items() if "reference" not in needs}


@pytest.mark.parametrize("target", TARGETS)
def test_needs(compiled: dict[str, Any], report: dict[str, Report], target: str) -> None:
    path, current = FOLDER / "needs" / f"{target}.txt", f"triton {compiled['triton']}"
    lines = [line(name, needs) for name, needs in sorted(report[target].items())]
    if ACCEPT:
        path.write_text("\n".join([current, *lines]) + "\n")
    version, *accepted = path.read_text().splitlines()
    if version != current:
        pytest.skip(f"{path.name} is of {version}")
    if not ALL:
        assert set(lines) <= set(accepted)
        return
    assert [one for one in lines if one[0] == "_"] == [one for one in accepted if one[0] == "_"]
    assert {one for one in accepted if one[0] != "_"} <= set(lines)  # of the many sizes, those that are recorded


def test_every_size_is_recorded() -> None:
    """The suite compiles a few kernels only; here the files must have those of every size, type and group."""
    report = compiled_by([f"{target}:cases" for target in WHOLE])["targets"]
    for target in WHOLE:
        recorded = (FOLDER / "needs" / f"{target}.txt").read_text().splitlines()
        missing = [case for case in report[target] if not any(one.startswith(f"{case} ") for one in recorded)]
        assert report[target] and missing == [], target


@pytest.mark.parametrize("target", [*WHOLE, *FEW])
def test_recorded_kernels_fit_and_use_matrix_units(target: str) -> None:
    """The same checks for the kernels at many sizes, which the suite does not compile."""
    _, *lines = (FOLDER / "needs" / f"{target}.txt").read_text().splitlines()
    report = {target: dict(needs_in(one) for one in lines)}
    assert [line(*pair) for pair in report[target].items()] == lines
    check_shared_memory(report, target)
    check_opcodes(report, target)


def needs_in(line: str) -> tuple[str, dict[str, Any]]:
    """The name and the needs, but for spills, of a line of a file."""
    name, _, text = line.partition(": ")
    if text.startswith("reference, as "):
        return name, {"reference": text.removeprefix("reference, as ")}
    [found] = re.findall(r"^(\d+) registers(?:, (\d+) bytes of shared memory)?(?:, )?(.*)$", text)
    opcodes = found[2].split(", ") if found[2] else []
    return name, {"registers": int(found[0]), "shared": int(found[1] or 0), "opcodes": opcodes}


def line(name: str, needs: dict[str, Any]) -> str:
    if "reference" in needs:
        return f"{name}: reference, as {needs['reference']}"
    shared = f", {needs['shared']} bytes of shared memory" if needs["shared"] else ""
    return f"{name}: {needs['registers']} registers{shared}{', '.join(['', *needs['opcodes']])}"


def test_integers_scans_and_selections_compile(tmp_path: Path) -> None:
    """Forms of ops that the package does not have. The interpreter accepts code that the compiler would refuse."""
    tree = tmp_path / "forms_tree"
    driver.generate_from_scratch([FOLDER.parent / "forms"], tree)
    environ = {**os.environ, "TRITON_CACHE_DIR": str(ROOT / ".cache/triton"), "SAGELLM_TREE": str(tree)}
    command = [sys.executable, FOLDER / "compile_ahead.py", f"sm_90:{'all' if ALL else FORMS}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)["targets"]["sm_90"]
    assert len(found) >= len(FORMS.split(","))
    assert {name: needs["spilled"] for name, needs in found.items() if needs["spilled"]} == {}


def test_row_kernels_load_and_store_16_bytes_at_a_time(report: dict[str, Report]) -> None:
    for name in ("_fused_add_rms_norm_rows", "_silu_mul_kernel"):
        if "sm_90" in report:
            assert {"LDG.E.128", "STG.E.128"} <= set(report["sm_90"][name]["opcodes"])
        if "gfx942" in report:
            assert report["gfx942"].get(name, {"loads_16_bytes": True})["loads_16_bytes"]  # the suite has one of them


MATRIX_UNITS = dict.fromkeys(["sm_80", *FEW], "HMMA") | {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}
COPIES = "LDGSTS.E"
"""cp.async: copies of 16 bytes into shared memory that do not wait."""


PRODUCTS = r"_?(\w+_attention|(add_rms_norm_)?linear(_silu_mul)?|router_logits|lm_head_sample|expert_(linear|down))"
"""Kernels that multiply matrices, by name or by op and size, if their opcodes are recorded."""
CODED = r"(codes of .* kernel|KV of .*attention.* (kernel|split))$"
"""Those that multiply by codes."""


@pytest.mark.parametrize("target", TARGETS)
def test_attention_and_gemms_use_matrix_units(report: dict[str, Report], target: str) -> None:
    check_opcodes(report, target)


def check_opcodes(report: dict[str, Report], target: str) -> None:
    """Matrix units in 16 bits. They would round numbers in float32, which are copied by cp.async all the same.

    Prompts and experts of many rows use wgmma on Hopper and tcgen05 on Blackwell, which require tiles of at least 64
    rows. Few rows use the older instructions, as do prompts of latent attention on Hopper, and on Blackwell if their
    group is no power of two.
    """
    used = {name: " ".join(needs["opcodes"]) for name, needs in compiled_of(report, target).items()}
    coded = {name: found for name, found in used.items() if re.match(CODED, name)}
    units = r"\b(HMMA|HGMMA|UTCHMMA|MFMA)\b"
    assert {name: found for name, found in coded.items() if not re.search(units, found)} == {}
    used = {name: found for name, found in used.items() if re.match(f"{PRODUCTS}[ _](.* )?(kernel|split)$", name)}
    expected = {name: matrix_unit(name, target) for name in used if " f32 " not in name}
    assert expected
    assert {name: used[name] for name in expected if expected[name] not in used[name].split()} == {}
    if target != "gfx942":
        assert {name: found for name, found in used.items() if COPIES not in found} == {}
    assert [name for name in used if name[0] == "_" and not report[target][name].get("loads_16_bytes", True)] == []


def matrix_unit(name: str, target: str) -> str:
    """The instruction of a kernel, by its name."""
    is_wide = name.endswith("kernel") and re.search("prefill_attention|varlen_attention|512 rows|4096 rows", name)
    is_small = "576" in name and (target == "sm_90" or (target == "sm_100" and re.search("group [357]", name)))
    if is_wide and not is_small:
        return MATRIX_UNITS[target]
    return "MFMA" if target == "gfx942" else "HMMA"


def test_decode_attention_has_two_buffers(report: dict[str, Report]) -> None:
    """While a tile of keys and one of values are used, the next ones are copied: 64 keys of 128 elements of bf16."""
    for target in {"sm_80", "sm_90", "sm_100"} & report.keys():
        assert report[target]["_paged_prefill_attention_split"]["shared"] >= 2 * 2 * 64 * 128 * 2
