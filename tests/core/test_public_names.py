"""Tests of the public names, and that the graph library imports the standard library only."""

import subprocess
import sys
from pathlib import Path

from sageLLM.runtime.execution_graph import ir

ROOT = Path(__file__).parents[2]
SEED_OP_TYPES = """PREFILL_ATTN DECODE_ATTN FFN EMBEDDING LM_HEAD LAYERNORM COMM_ALLREDUCE COMM_ALLGATHER
COMM_SEND COMM_RECV KV_LOAD KV_STORE KV_MIGRATE"""


def test_the_seed_op_types_come_first() -> None:
    assert [kind.name for kind in ir.OpType][:13] == SEED_OP_TYPES.split()


def test_the_seed_names_are_there() -> None:
    assert {"OpType", "TensorRef", "ExecutionNode", "ExecutionGraph"} <= set(ir.__all__)
    assert all(hasattr(ir, name) for name in ir.__all__)


def test_the_library_needs_only_the_standard_library() -> None:
    """-S leaves out site-packages, so an import of anything else fails."""
    folder = ROOT / "runtime" / "core"
    paths = sorted(path for path in folder.rglob("*.py") if path.stem != "__init__")
    modules = [".".join(("sageLLM", *path.relative_to(ROOT).with_suffix("").parts)) for path in paths]
    program = f"import sys; sys.path.insert(0, {str(ROOT / '_dev')!r}); import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(modules) >= 35
