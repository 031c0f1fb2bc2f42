"""Tests the direction of imports: specs -> codegen -> generated -> runtime, no circles, and a light runtime."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Layer:
    """The imports that the modules under a folder may have besides the standard library."""

    ours: tuple[str, ...]
    others: frozenset[str] = frozenset()
    lazily: frozenset[str] = frozenset()  # only inside a function


def runtime_layer(*packages: str, others: str = "", lazily: str = "") -> Layer:
    """A package of the runtime that may import `packages`, the core, errors, files and the generated code."""
    ours = [f"sageLLM.runtime.{name}" for name in ("core", "errors", "files", *packages)]
    return Layer((*ours, "sageLLM.generated"), frozenset(others.split()), frozenset(lazily.split()))


BELOW_WORKER = (
    "transport",
    "kv",
    "scheduler",
    "registry",
    "execution_graph",
    "kernels",
    "executor",
    "loader",
    "sampling",
)

# The longest folder that contains a module decides. Packages of the runtime are in the order of the layers.
LAYERS = {
    "codegen": Layer(
        ours=("sageLLM.codegen", "sageLLM.__version__"),
        others=frozenset(
            {"clang_format", "jinja2", "networkx", "pydantic", "pydantic_core", "ruamel", "typer", "yaml"}
        ),
    ),
    "generated": Layer(ours=("sageLLM.generated", "sageLLM.runtime.core")),
    "generated/kernels": Layer(
        ours=("sageLLM.generated", "sageLLM.runtime.core"), others=frozenset({"torch", "triton"})
    ),
    "generated/formats/values": Layer(ours=("sageLLM.generated", "sageLLM.runtime.core"), others=frozenset({"torch"})),
    "generated/tests": Layer(ours=("sageLLM.generated", "sageLLM.runtime.core"), others=frozenset({"pytest", "torch"})),
    "runtime/errors.py": Layer(ours=("sageLLM.runtime.core.printable",)),
    "runtime/files.py": Layer(ours=("sageLLM.runtime.errors",)),
    "runtime/core": Layer(ours=("sageLLM.runtime.core",)),
    "runtime/kv": runtime_layer("kv"),
    "runtime/scheduler": runtime_layer("kv", "scheduler"),
    "runtime/sim": runtime_layer("kv", "scheduler", "sim", others="numpy"),
    "runtime/sim/calibration": runtime_layer("sim", others="numpy", lazily="pyarrow"),
    "runtime/deploy": runtime_layer("deploy"),
    "runtime/registry": runtime_layer("registry"),
    "runtime/execution_graph": runtime_layer("registry", "scheduler", "execution_graph", others="numpy"),
    "runtime/kernels": runtime_layer("kernels", others="torch numpy", lazily="triton"),
    "runtime/executor": runtime_layer(
        "registry", "execution_graph", "kernels", "executor", others="torch numpy", lazily="triton"
    ),
    "runtime/loader": runtime_layer(
        "registry", "execution_graph", "kernels", "executor", "loader", others="torch numpy safetensors msgspec"
    ),
    "runtime/text": runtime_layer("text", others="tokenizers"),
    "runtime/text/chat_template_worker.py": Layer(ours=(), others=frozenset({"jinja2"})),  # runs as its own process
    "runtime/text/tokenizer_probe_worker.py": Layer(ours=(), others=frozenset({"tokenizers"})),  # so does this
    "runtime/sampling": runtime_layer("sampling", others="torch"),
    "runtime/grammar": runtime_layer("text", "sampling", "grammar", others="torch numpy", lazily="llguidance"),
    "runtime/transport": runtime_layer("transport", "kernels", others="torch msgspec", lazily="nixl"),
    "runtime/worker": runtime_layer(*BELOW_WORKER, "grammar", "worker", others="torch numpy msgspec"),
    "runtime/quantize": runtime_layer(*BELOW_WORKER, "worker", "quantize", others="torch numpy"),
    "runtime/convert": runtime_layer(*BELOW_WORKER, "text", "quantize", "convert", others="torch"),
    "runtime/worker/fingerprint.py": Layer(
        ours=("sageLLM.runtime", "sageLLM.generated", "sageLLM.__version__"), others=frozenset({"torch"})
    ),
    "runtime/engine": runtime_layer(
        *BELOW_WORKER, "text", "grammar", "worker", "engine", others="torch numpy", lazily="triton"
    ),
    "runtime/server": Layer(
        ours=("sageLLM.runtime", "sageLLM.__version__"),
        others=frozenset({"msgspec", "numpy", "prometheus_client", "starlette", "uvicorn"}),
        lazily=frozenset({"opentelemetry"}),
    ),
    "runtime/engine/kv_events.py": runtime_layer("kv", others="msgspec", lazily="zmq"),
    "runtime/bench": runtime_layer(
        *BELOW_WORKER, "text", "worker", "engine", "sim", "bench", others="torch numpy msgspec"
    ),
    "runtime/inspect": runtime_layer("registry", "execution_graph", "kernels", "executor", "inspect", others="torch"),
    "runtime/inspect/checkpoint_report.py": runtime_layer("registry", "execution_graph"),
    "runtime/cli": Layer(ours=("sageLLM.runtime", "sageLLM.generated")),
    # The command joins the generator and the runtime; each subcommand imports its side when it runs.
    "runtime/cli/entry.py": Layer(ours=("sageLLM.runtime", "sageLLM.codegen")),
    "runtime/cli/main.py": Layer(ours=("sageLLM.runtime", "sageLLM.codegen"), others=frozenset({"typer"})),
    "runtime/cli/doctor.py": Layer(ours=("sageLLM.runtime",), lazily=frozenset({"torch"})),
    "runtime/cli/serve.py": Layer(ours=("sageLLM.runtime",), lazily=frozenset({"uvloop"})),
    "runtime/cli/serve_engine.py": Layer(ours=("sageLLM.runtime",), others=frozenset({"msgspec"})),
    "runtime/cli/serve_options.py": Layer(ours=("sageLLM.runtime",), lazily=frozenset({"typer", "yaml"})),
    "runtime/cli/bench_commands.py": Layer(ours=("sageLLM.runtime",), others=frozenset({"typer"})),
    "runtime/cli/checkpoint_commands.py": Layer(ours=("sageLLM.runtime",), others=frozenset({"typer"})),
    "runtime/cli/worker_command.py": Layer(ours=("sageLLM.runtime",), others=frozenset({"typer"})),
    "runtime/cli/options.py": Layer(ours=("sageLLM.runtime",), lazily=frozenset({"typer"})),
    "runtime/cli/deploy.py": Layer(ours=("sageLLM.runtime", "sageLLM.codegen")),
    "runtime/cli/dynamo_command.py": Layer(ours=("sageLLM.runtime",), others=frozenset({"typer"})),
    "runtime/cli/dynamo_worker.py": Layer(ours=("sageLLM.runtime",), lazily=frozenset({"dynamo"})),
    "runtime/cli/dynamo_engine.py": Layer(ours=("sageLLM.runtime",), lazily=frozenset({"dynamo"})),
    "runtime/cli/plan.py": Layer(ours=("sageLLM.runtime", "sageLLM.generated", "sageLLM.codegen")),
    "runtime/cli/deploy_commands.py": Layer(ours=("sageLLM.runtime",), others=frozenset({"typer"})),
    "runtime/cli/deploy_file.py": Layer(ours=("sageLLM.runtime", "sageLLM.codegen")),
    "runtime/cli/hardware_entry.py": Layer(ours=("sageLLM.runtime", "sageLLM.generated", "sageLLM.codegen")),
    "runtime": Layer(ours=()),
}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name, made absolute."""

    name: str
    line: int
    is_lazy: bool
    is_relative: bool


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Every import in the file, those inside functions and `import_module("...")` included."""
    package = ["sageLLM", *path.relative_to(root).parent.parts]

    def walk(node: ast.AST, is_lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for name, is_relative in names_of(child, package):
                yield Import(name, getattr(child, "lineno", 0), is_lazy, is_relative)
            yield from walk(child, is_lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), is_lazy=False)


def names_of(node: ast.AST, package: list[str]) -> list[tuple[str, bool]]:
    match node:
        case ast.Import(names=names):
            return [(alias.name, False) for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            base = package[: len(package) - level + 1] if level else []
            prefix = ".".join([*base, *([module] if module else [])])
            return [(f"{prefix}.{alias.name}", level > 0) for alias in names]
        case ast.Call(func=ast.Name(id="import_module" | "__import__"), args=[ast.Constant(value=str(name)), *_]):
            return [(name, False)]
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
            return [(name, False)]
    return []


def why_not_allowed(found: Import, module: str, layer: Layer) -> str | None:
    """The rule that the import breaks, or None."""
    top = found.name.partition(".")[0]
    if top == "sageLLM":
        if not any(f"{found.name}.".startswith(f"{name}.") for name in layer.ours):
            return f"may import of ours only {', '.join(layer.ours)}"
        if module.startswith("generated/") and found.name.startswith("sageLLM.generated") and not found.is_relative:
            return "must import its own package relatively: it also lives outside this package"
        return None
    if top in sys.stdlib_module_names or top in layer.others:
        return None
    if top in layer.lazily:
        return None if found.is_lazy else f"may import {top} only inside a function"
    return f"may not import {top}"


def broken_rules(root: Path) -> list[str]:
    """`file:line: import X: rule` for each import that a layer does not allow."""
    found = []
    for path in sorted(p for top in ("codegen", "generated", "runtime") for p in (root / top).rglob("*.py")):
        module = path.relative_to(root).as_posix()
        layer = LAYERS[max((p for p in LAYERS if f"{module}/".startswith(f"{p}/")), key=len)]
        for imported in imports_of(path, root):
            if why := why_not_allowed(imported, module, layer):
                found.append(f"{module}:{imported.line}: import {imported.name}: {why}")
    return found


def test_imports_point_one_way() -> None:
    assert broken_rules(ROOT) == []


# The layers of codegen from the bottom up. A module imports its own folder and the layers below its own.
CODEGEN_LAYERS = (
    {"codes", "contents", "diagnostics"},
    {"folders", "names"},
    {"facts"},
    {"source", "state"},
    {"schema"},
    {"load", "render", "swap"},
    {"expr", "spec_files", "writer"},
    {"model"},
    {"link", "kernel"},
    {"emit"},
    {"expectations", "explain", "incremental", "scaffold"},
    {"update"},
    {"driver"},
    {"commands", "__init__"},
)
# Emitters read the linked model, so that a change of the linker that leaves the model alone changes no output.
NOT_IMPORTED = {("emit", "link")}


def codegen_layer(name: str) -> int:
    return next(level for level, names in enumerate(CODEGEN_LAYERS) if name in names)


def why_not_below(importer: str, imported: str) -> str | None:
    """The rule that an import between two parts of codegen breaks, or None."""
    if importer == imported:
        return None
    if (importer, imported) in NOT_IMPORTED or codegen_layer(imported) >= codegen_layer(importer):
        return f"{importer} may not import {imported}"
    return None


def broken_codegen_layers(root: Path) -> list[str]:
    found = []
    for path in sorted((root / "codegen").rglob("*.py")):
        importer = path.relative_to(root / "codegen").parts[0].removesuffix(".py")
        for imported in imports_of(path, root):
            top, _, rest = imported.name.partition("sageLLM.codegen.")
            part = rest.split(".")[0]
            if not top and rest and (why := why_not_below(importer, part)):
                found.append(f"{path.relative_to(root).as_posix()}:{imported.line}: {why}")
    return found


def test_layers_of_codegen_point_one_way() -> None:
    assert broken_codegen_layers(ROOT) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("codegen/kernel/lower.py", "from sageLLM.codegen.link import calls"),
        ("codegen/emit/cpu.py", "def f():\n    from sageLLM.codegen.link.config import INDEX"),
        ("codegen/model/op.py", "from ..emit import cpu"),
        ("codegen/load.py", "import sageLLM.codegen.model.op"),
    ],
)
def test_an_import_of_a_higher_layer_is_found(tmp_path: Path, module: str, line: str) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(broken_codegen_layers(tmp_path)) == 1


@pytest.mark.parametrize(
    ("module", "line", "rule"),
    [
        ("codegen/link.py", "from sageLLM.runtime.core import node", "may import of ours only sageLLM.codegen,"),
        ("codegen/emit/ops.py", "from ...generated import ops", "may import of ours only sageLLM.codegen,"),
        ("codegen/link.py", "from sageLLM import LLM", "may import of ours only sageLLM.codegen,"),
        ("codegen/link.py", "def f():\n    import torch.nn", "may not import torch"),
        ("generated/ops/norm.py", "from sageLLM.runtime.engine import llm", "may import of ours only sageLLM.gener"),
        ("generated/ops/norm.py", "from sageLLM.generated.ops import gemm", "must import its own package relatively"),
        ("generated/ops/norm.py", "import torch", "may not import torch"),
        ("runtime/engine/llm.py", "from ...codegen import link", "may import of ours only sageLLM.runtime.core,"),
        ("runtime/engine/llm.py", "import_module('yaml')", "may not import yaml"),
        ("runtime/engine/llm.py", "import triton", "may import triton only inside a function"),
        ("runtime/engine/llm.py", "def f():\n    import jinja2", "may not import jinja2"),
        ("runtime/core/ir/graph.py", "from ... import kv", "may import of ours only sageLLM.runtime.core"),
        ("runtime/kv/pool.py", "if True:\n    import torch", "may not import torch"),
        ("runtime/scheduler/base.py", "from ..engine import llm", "may import of ours only sageLLM.runtime.core"),
        ("runtime/execution_graph/expand.py", "from ..executor import planner", "may import of ours only"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, module: str, line: str, rule: str) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(line)
    [found] = broken_rules(tmp_path)
    assert found.startswith(f"{module}:") and rule in found


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("codegen/emit/ops.py", "from ..model import op\nimport jinja2"),
        ("generated/ops/norm.py", "from . import gemm\nfrom sageLLM.runtime.core import node"),
        ("generated/kernels/reference/norm.py", "import torch"),
        ("runtime/text/chat_template_worker.py", "import jinja2.sandbox"),
        ("runtime/engine/llm.py", "def f():\n    import triton"),
        ("runtime/scheduler/base.py", "from ..kv import blocks\nimport heapq"),
    ],
)
def test_a_right_import_is_let_through(tmp_path: Path, module: str, line: str) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert broken_rules(tmp_path) == []


def import_graph(root: Path) -> nx.DiGraph[str]:
    """Modules of the runtime by their imports; those for type checkers and those inside functions count as well."""
    paths = sorted((root / "runtime").rglob("*.py"))
    names = {".".join(("sageLLM", *path.relative_to(root).with_suffix("").parts)): path for path in paths}
    graph = nx.DiGraph()
    for name, path in names.items():
        for imported in imports_of(path, root):
            # `from package.module import name` and `from package import module` look alike to the parser.
            target = imported.name if imported.name in names else imported.name.rpartition(".")[0]
            if target in names and target != name:
                graph.add_edge(name, target)
    return graph


def circles(graph: nx.DiGraph[str]) -> list[list[str]]:
    return [sorted(found) for found in nx.strongly_connected_components(graph) if len(found) > 1]


def package_graph(modules: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """The same imports between packages; a module next to subpackages, such as core/errors.py, counts by itself."""
    parents = {module.rpartition(".")[0] for module in modules}
    with_subpackages = {parent.rpartition(".")[0] for parent in parents}
    package = {m: m if (parent := m.rpartition(".")[0]) in with_subpackages else parent for m in modules}
    return nx.DiGraph((package[a], package[b]) for a, b in modules.edges if package[a] != package[b])


def test_modules_import_in_no_circle() -> None:
    assert circles(import_graph(ROOT)) == []


def test_packages_import_in_no_circle() -> None:
    assert circles(package_graph(import_graph(ROOT))) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    files = {
        "kv/pool.py": "if TYPE_CHECKING:\n    from sageLLM.runtime.kv.swap import Swap",
        "kv/swap.py": "from sageLLM.runtime.kv import pool",
        "text/stop.py": "from sageLLM.runtime.kv import pool\nfrom sageLLM.runtime.engine.outputs import Output",
        "engine/outputs.py": "",
        "engine/llm.py": "def f():\n    from sageLLM.runtime.text.stop import find",
    }
    for name, text in files.items():
        path = tmp_path / "runtime" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    modules = import_graph(tmp_path)
    assert circles(modules) == [["sageLLM.runtime.kv.pool", "sageLLM.runtime.kv.swap"]]
    assert circles(package_graph(modules)) == [["sageLLM.runtime.engine", "sageLLM.runtime.text"]]


LOADED = """
import importlib, pathlib, sys
import sageLLM
COMMANDS = ("main.py", "bench_commands.py", "checkpoint_commands.py", "deploy_commands.py", "dynamo_command.py",
            "worker_command.py")
root = pathlib.Path(sageLLM.__file__).parent
for path in sorted(p for folder in sys.argv[1].split() for p in (root / folder).rglob("*.py")):
    if path.stem != "__main__" and "triton" not in path.parts and path.name not in COMMANDS:
        module = ".".join(("sageLLM", *path.relative_to(root).with_suffix("").parts))
        importlib.import_module(module.removesuffix(".__init__"))
print(*sorted(set(sys.argv[2].split()) & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("folders", "unwanted"),
    [
        ("runtime/core runtime/scheduler runtime/kv", "torch numpy pydantic jinja2 networkx yaml typer"),
        ("runtime/sim", "torch pydantic jinja2 networkx yaml typer"),
        ("codegen", "torch transformers sageLLM.runtime sageLLM.generated"),
        ("runtime generated", "sageLLM.codegen pydantic yaml ruamel typer triton"),
    ],
)
def test_what_loads_with_a_layer(folders: str, unwanted: str) -> None:
    """The rules above see one file at a time; here the whole chain is loaded, folders named triton aside."""
    command = [sys.executable, "-c", LOADED, folders, unwanted]
    environ = os.environ | {"PYTHONPATH": str(ROOT / "_dev")}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_what_generate_loads_has_no_torch() -> None:
    """`sagellm generate` counts how often rules fire, in graphs that need no torch."""
    code = "import sys, sageLLM.runtime.inspect.expectations; print('torch' in sys.modules)"
    environ = os.environ | {"PYTHONPATH": str(ROOT / "_dev")}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_runtime_package_root_stays_empty() -> None:
    assert (ROOT / "runtime/__init__.py").read_bytes() == b"", "an import here closes the circle generated -> runtime"


def test_collections_omit_what_the_import_has_made() -> None:
    """A full collection with the objects of torch would take 0.1 s in the middle of a step."""
    program = "import gc\nfrom sageLLM import LLM\nprint(gc.isenabled(), gc.get_freeze_count(), len(gc.get_objects()))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    is_enabled, frozen, others = done.stdout.split()
    assert is_enabled == "True" and int(frozen) > 50_000 and int(others) < 1_000
