"""Runs of `benchmarks/gpu.py`: a part that crashes or hangs loses neither its rows nor the other parts."""

import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
WRITES = "import json, sys; open(sys.argv[1], 'a').write(json.dumps({'name': sys.argv[2]}) + chr(10)); "


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def test_a_part_that_crashes_or_hangs_does_not_end_the_run(gpu: ModuleType, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows", tmp_path / "out.json"
    ends = {
        "crash": "import os; os.abort()",
        "hang": "import time; open(sys.argv[1], 'a').write('cut off'); time.sleep(60)",
        "fine": "import os; assert os.environ['CUDA_VISIBLE_DEVICES'] == '3'",
    }
    parts = [gpu.Part(name, [sys.executable, "-c", WRITES + end, str(rows), name], 2.0) for name, end in ends.items()]
    alone = "assert __import__('os').environ.get('CUDA_VISIBLE_DEVICES') != '3'"
    parts.insert(0, gpu.Part("all", [sys.executable, "-c", WRITES + alone, str(rows), "all"], 2.0, uses_all=True))
    start = time.monotonic()
    gpu.run_parts(parts, ["3"], out, rows, 20.0, {})
    assert time.monotonic() - start < 15
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["rows"]] == ["crash", "hang", "fine", "all"]
    ended = {name: part["ended"] for name, part in report["parts"].items()}
    assert ended == {
        "crash": "failed with status -6",
        "hang": "stopped after 2 s",
        "fine": "complete",
        "all": "complete",
    }


def test_parts_are_divided_among_devices_and_end_with_the_time_of_the_run(gpu: ModuleType, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows", tmp_path / "out.json"
    parts = [gpu.Part(str(i), [sys.executable, "-c", "import time; time.sleep(60)"], 60.0) for i in range(3)]
    report = gpu.run_parts(parts, ["0", "1"], out, rows, 1.5, {})
    ended = sorted(part["ended"].partition(" after")[0] for part in report["parts"].values())
    assert ended == ["not run: no time was left", "stopped", "stopped"]


def test_processes_that_a_part_leaves_behind_do_not_delay_the_run(gpu: ModuleType, tmp_path: Path) -> None:
    """Compilers of torch have a session of their own, so that they outlive a part that is killed."""
    left = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'], start_new_session=True)"
    code = f"import subprocess, sys, time; print('unwell', file=sys.stderr, flush=True); {left}; time.sleep(60)"
    start = time.monotonic()
    found = gpu.run_part(gpu.Part("hang", [sys.executable, "-c", code], 3.0), {}, start + 60)
    assert time.monotonic() - start < 12
    assert (found["ended"], found["stderr"]) == ("stopped after 3 s", "unwell\n")
