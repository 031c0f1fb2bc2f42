"""`sagellm graph` and `sagellm generate --diff`: graphs for people to look at, and what a spec change does to them."""

import dataclasses
import difflib
import filecmp
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from sageLLM.runtime.core.config import HFConfig
from sageLLM.runtime.core.export import to_dot, to_html, to_json, to_mermaid
from sageLLM.runtime.core.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.text import to_text
from sageLLM.runtime.engine.plugins import load_registry, load_tree
from sageLLM.runtime.execution_graph.pipeline import Pipeline
from sageLLM.runtime.execution_graph.summary import diff_lines, summarise


@dataclass(frozen=True, slots=True)
class GraphRequest:
    """The arguments of `sagellm graph`. `passes` are names by commas; None is all, "" none.

    Without a stage it is decode, or prefill for a layout that has no other.
    """

    model: str
    stage: Stage | None
    level: str
    passes: str | None
    print_ir_after: str | None
    diff: bool
    format: str
    plugins: Sequence[Path]


def show_graph(request: GraphRequest) -> int:
    """Prints the graph to stdout. An unknown model or pass is an error that lists the known ones."""
    try:
        print(_graph_text(request, _pipeline(request)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _pipeline(request: GraphRequest) -> Pipeline:
    registry = load_registry(request.plugins)
    path = Path(request.model) / "config.json"
    if request.model in registry.models:
        layout = registry.models[request.model]
        config = HFConfig(layout.tiny, f"{layout.name}: tests.tiny")
    elif path.is_file():
        data = json.loads(path.read_bytes())
        found = registry.layout_of(str((data.get("architectures") or [""])[0]))
        if found is None:
            raise ValueError(f"{path}: no layout reads {data.get('architectures')}")
        layout, config = found, HFConfig(data, str(path))
    else:
        known = ", ".join(registry.models)
        raise ValueError(f"'{request.model}' is neither a model ({known}) nor a folder with a config.json")
    chosen = None if request.passes is None else [name for name in request.passes.split(",") if name]
    disable = [] if chosen is None else [name for name in registry.passes if name not in chosen]
    unknown = sorted(set(chosen or ()) - set(registry.passes))
    if unknown:
        raise ValueError(f"no pass named {', '.join(unknown)}; known are {', '.join(registry.passes)}")
    return Pipeline(layout, layout.read_config(config), registry, dtype="f32", disable=disable)


def _stage(request: GraphRequest, pipeline: Pipeline) -> Stage:
    phases = pipeline.layout.phases
    return request.stage or ("decode" if "decode" in phases else phases[0])


def _graph_text(request: GraphRequest, pipeline: Pipeline) -> str:
    if request.level == "block":
        return _formatted(request, {"block": pipeline.block_graph(_stage(request, pipeline))})
    before = pipeline.expanded_graph(_stage(request, pipeline))
    states = {"expanded": before} | {one.name: graph for one, graph in pipeline.steps(before)}
    if request.diff:
        return _changes(list(states.items()))
    if request.print_ir_after == "all":
        return _formatted(request, states)
    last = request.print_ir_after or list(states)[-1]
    if last not in states:
        raise ValueError(f"no pass named {last} ran; those that ran are {', '.join(states)}")
    return _formatted(request, {last: states[last]})


def _formatted(request: GraphRequest, graphs: dict[str, ExecutionGraph]) -> str:
    if request.format == "html":
        return to_html(graphs, title=f"{request.model}, {next(iter(graphs.values())).stage}")
    show = {"text": to_text, "json": to_json, "dot": to_dot, "mermaid": to_mermaid}[request.format]
    if len(graphs) == 1:
        return str(show(next(iter(graphs.values()))))
    return "\n".join(f"// after {name}\n{show(graph)}" for name, graph in graphs.items())


def _changes(states: list[tuple[str, ExecutionGraph]]) -> str:
    """A unified diff of the graph's text for each pass that changed something."""
    parts: list[str] = []
    for (before_name, before), (after_name, after) in pairwise(states):
        lines = difflib.unified_diff(
            to_text(before).splitlines(), to_text(after).splitlines(), before_name, after_name, n=0, lineterm=""
        )
        parts += lines
    return "\n".join(parts) or "no pass changed the graph"


def show_spec_diff(old: Path, new: Path, as_json: bool) -> int:
    """What the specs as they stand would change in the generated tree, and so in every model's graphs."""
    if not (old / "__init__.py").is_file():
        print(f"error: {old} is not a generated folder, so there is nothing to compare with", file=sys.stderr)
        return 1
    before, after = (summarise(load_tree(tree)) for tree in (old, new))
    lines = diff_lines(before, after)
    files = _changed_files(old, new)
    if as_json:
        data = {name: {s: dataclasses.asdict(one) for s, one in stages.items()} for name, stages in after.items()}
        print(json.dumps({"files": files, "changes": lines, "after": data}))
        return 0
    for file in files:
        print(file)
    print("\n".join(lines) or "no graph changes")
    return 0


def _changed_files(old: Path, new: Path) -> list[str]:
    names = {
        path.relative_to(tree).as_posix()
        for tree in (old, new)
        for path in tree.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "MANIFEST.json"
    }
    marks = {(True, False): "removed", (False, True): "new"}
    lines = []
    for name in sorted(names):
        there = ((old / name).is_file(), (new / name).is_file())
        if there != (True, True):
            lines.append(f"{marks[there]}: {name}")
        elif not filecmp.cmp(old / name, new / name, shallow=False):
            lines.append(f"changed: {name}")
    return lines
