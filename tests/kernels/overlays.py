"""Overlays made by tests: linked one op at a time, generated as one tree, and run on every target."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from sageLLM.codegen import driver
from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.emit import emit_op_modules
from sageLLM.codegen.link.ops import link_ops
from sageLLM.codegen.load import RawSpecs, assemble, check_file, load_specs
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer
from sageLLM.codegen.source import parse_document

Ops = Mapping[str, Mapping[str, Any]]
RUNS = Path(__file__).with_name("overlay_runs.py")


@cache
def base() -> RawSpecs:
    return load_specs([driver.BASE_SPECS])


@cache
def renderer() -> Renderer:
    return Renderer()


def linked(ops: Ops) -> Specs:
    """The ops with the package's dims and op types. Raises SpecErrors."""
    sink, text = Sink(), json.dumps({"schema": "ops/v1", "ops": ops})
    file = check_file(parse_document(text, display="specs/ops/made.yaml"), sink)
    sink.raise_if_any()
    raw = replace(base().vocabulary(), ops=assemble([file] if file else [], frozenset(), sink).ops)
    sink.raise_if_any()
    found = link_ops(raw, sink)
    sink.raise_if_any()
    return Specs(raw, found, {}, {}, base().hardware, {}, {})


def emitted(specs: Specs) -> list[Output]:
    """The modules of all ops; those in Python must parse."""
    outputs = emit_op_modules(list(specs.ops.values()), specs, renderer())
    for output in outputs:
        if output.path.endswith(".py"):
            compile(output.text, output.path, "exec")
    return outputs


def run_on_all_targets(ops: Ops, folder: Path, seed: str) -> list[dict[str, str]]:
    """Generates the ops as an overlay and compares each kernel with its reference: op, target, and what is wrong."""
    specs = folder / "overlay_specs/ops"
    specs.mkdir(parents=True)
    (specs / "made.yaml").write_text(json.dumps({"schema": "ops/v1", "ops": ops}), encoding="utf-8")
    tree = folder / "made_tree"
    driver.generate_from_scratch([specs.parent], tree)
    return run_tree(tree, seed)


def run_tree(tree: Path, seed: str) -> list[dict[str, str]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(RUNS), str(tree), seed]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
