"""Commands `sagellm graph` and `sagellm explain MODEL:NODE`: views of graphs and of the passes over them."""

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from sageLLM.generated.hardware import HARDWARE
from sageLLM.generated.ops.op_types import OpType
from sageLLM.runtime.core.cost import Hardware, annotate
from sageLLM.runtime.core.ir.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.ir.order import Span
from sageLLM.runtime.core.ir.text import parse_text, to_text
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.rewrite.stats import Change
from sageLLM.runtime.execution_graph.model_graphs import ModelGraphs
from sageLLM.runtime.execution_graph.rewriting import Choice, Rewriting
from sageLLM.runtime.inspect.explain_node import explain_node
from sageLLM.runtime.inspect.export import to_chrome_trace, to_dot, to_html, to_json, to_mermaid, to_page
from sageLLM.runtime.inspect.rule_table import rule_table
from sageLLM.runtime.inspect.summary import STEP, step_of
from sageLLM.runtime.inspect.traces import traces_of
from sageLLM.runtime.inspect.why_not import why_not
from sageLLM.runtime.loader.config_file import layout_of, read_config_file
from sageLLM.runtime.registry.plugins import Registry, load_registry


@dataclass(frozen=True, slots=True)
class GraphRequest:
    """The arguments of `sagellm graph`. `only` and `disable` list passes and rules by commas; None means all.

    The default stage is decode, or prefill for a layout without decode; a web page shows all stages. `model` may be a
    file with a graph as text. `hardware` is the device for estimated times, by default h100, or with `measure` cpu.
    `measure` runs the graph here. With several `tensor_parallel_size`, the graph is that of a rank, with its streams.
    """

    model: str
    stage: Stage | None
    level: str = "kernel"
    only: str | None = None
    disable: str = ""
    rewrite_limit: int | None = None
    print_ir_after: str | None = None
    diff: bool = False
    stats: bool = False
    verify_numerics: bool = False
    bisect: bool = False
    why_not: tuple[str, str] | None = None
    format: str = "text"
    hardware: str | None = None
    measure: bool = False
    tensor_parallel_size: int = 1
    plugins: Sequence[Path] = ()


def show_graph(request: GraphRequest) -> int:
    """Prints the graph, or the requested report on its passes, to stdout. An error for an unknown name lists the known.

    Exit code 1: an error, or a pass that changes results.
    """
    try:
        text, is_right = _Inspection(request).answer()
    except (ValueError, OSError) as error:
        print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 1
    print(text)
    return 0 if is_right else 1


def show_node(model: str, stage: Stage, node_id: str) -> int:
    """Prints the explanation of a node of a layout's graph, on its small config."""
    try:
        registry = load_registry()
        layout, config = _layout(model, registry)
        graphs = ModelGraphs(layout, layout.read_config(config), registry, dtype="f32")
        print(explain_node(graphs, stage if stage in layout.phases else layout.phases[0], node_id))
    except (LookupError, ValueError) as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return 1
    return 0


class _Inspection:
    """Answers one request."""

    def __init__(self, request: GraphRequest) -> None:
        self.request = request
        registry = load_registry(request.plugins)
        choice: Choice = {
            "disable": _names(request.disable) or (),
            "only": _names(request.only),
            "limit": request.rewrite_limit,
        }
        self.graphs: ModelGraphs | None = None
        if Path(request.model).suffix == ".txt":
            text = Path(request.model).read_text(encoding="utf-8")
            self.rewriting = Rewriting(registry, **choice)
            self.before = parse_text(text, OpType, registry.ops)
            return
        layout, config = _layout(request.model, registry)
        dtype = "f64" if request.verify_numerics or request.bisect else "f32"
        own = layout.read_config(config)
        if request.tensor_parallel_size > 1:
            own = layout.shard_config(own, request.tensor_parallel_size)
        self.rewriting = self.graphs = ModelGraphs(layout, own, registry, dtype=dtype, **choice)
        self.stage = request.stage or ("decode" if "decode" in layout.phases else layout.phases[0])
        if request.level == "block":
            self.before = self.graphs.block_graph(self.stage)
        else:
            self.before = self.graphs.expanded_graph(self.stage)

    def answer(self) -> tuple[str, bool]:
        """The text to print, and whether all checks passed."""
        request = self.request
        if request.format == "html" and self.graphs is not None:
            stages = (request.stage,) if request.stage else self.graphs.layout.phases
            return to_page(traces_of(self.graphs, self._hardware(), stages), f"{request.model}: passes"), True
        if request.level == "block":
            return _formatted(request, {"block": self.before}), True
        if request.verify_numerics or request.bisect:
            return self._numerics()
        if request.why_not is not None:
            return why_not(self.rewriting, self.before, *request.why_not), True
        steps = list(self.rewriting.steps(self.before))
        if request.stats:
            step = {**STEP, **(step_of(self.before.stage, self.graphs.config) if self.graphs else {})}
            return rule_table([one.report for one, _ in steps], step), True
        states = {"expanded": self.before} | {one.name: graph for one, graph in steps}
        if request.tensor_parallel_size > 1:
            states |= self._scheduled(list(states.values())[-1])
        return self._shown(states), True

    def _scheduled(self, graph: ExecutionGraph) -> dict[str, ExecutionGraph]:
        """The graph after the passes that choose the streams of a rank's transfers."""
        from sageLLM.runtime.executor.scheduling import schedule_streams  # torch, only for this

        graph = graph.copy()
        graph.model_config = self.graphs.config if self.graphs else None
        passes = self.rewriting.stream_passes()
        schedule_streams(graph, passes, self._hardware(), {"tp": self.request.tensor_parallel_size})
        return {one.name: graph for one in passes}

    def _shown(self, states: dict[str, ExecutionGraph]) -> str:
        request = self.request
        if request.diff:
            return _changes(list(states.items()))
        if request.print_ir_after == "all":
            return _formatted(request, states)
        last = request.print_ir_after or list(states)[-1]
        if last not in states:
            raise ValueError(f"pass {last} did not run; those that ran are {', '.join(states)}")
        if request.format == "trace" or request.measure:
            return self._timed(states[last])
        return _formatted(request, {last: states[last]})

    def _timed(self, graph: ExecutionGraph) -> str:
        """A trace of the planned and the measured step, or a table of both."""
        if self.graphs is None:
            raise ValueError("a trace requires a model, got a graph as text, which includes its own times")
        hardware, ranks = self._hardware(), {"tp": self.request.tensor_parallel_size}
        plan = f"estimated on {hardware.name}"
        if not self.request.measure:
            annotate(graph, hardware, {**step_of(self.stage, self.graphs.config), **ranks})
            return to_chrome_trace({plan: (graph, None)})
        from sageLLM.runtime.inspect.measure import measured_sizes
        from sageLLM.runtime.inspect.side_by_side import side_by_side

        graph.model_config = self.graphs.config
        annotate(graph, hardware, {**measured_sizes(graph), **ranks})
        kernels, spans = self._measured(graph)
        run = f"measured here, on {kernels}"
        if self.request.format == "trace":
            return to_chrome_trace({plan: (graph, None), run: (graph, spans)})
        return side_by_side(graph, spans, plan, run)

    def _measured(self, graph: ExecutionGraph) -> tuple[str, Mapping[str, Span]]:
        from sageLLM.runtime.inspect.measure import measure  # torch, only for these
        from sageLLM.runtime.inspect.measure_ranks import measure_ranks

        if self.request.tensor_parallel_size > 1:
            return measure_ranks(graph, self.request.tensor_parallel_size, self.request.plugins)
        return measure(graph, self.rewriting.registry)

    def _hardware(self) -> Hardware:
        name = self.request.hardware or ("cpu" if self.request.measure else "h100")
        if name not in HARDWARE:
            raise ValueError(f"unknown device {name}; known are {', '.join(HARDWARE)}")
        return HARDWARE[name]

    def _numerics(self) -> tuple[str, bool]:
        from sageLLM.runtime.inspect.numerics import find_bad_rewrite, verify_numerics  # torch, only for these

        if self.graphs is None:
            raise ValueError("the numerical check requires a model, got a graph as text, which lacks reference inputs")
        if self.request.bisect:
            found = find_bad_rewrite(self.graphs, self.stage)
            return ("no rewrite changes a result", True) if found is None else (_report_bad(*found), False)
        verdicts = list(verify_numerics(self.graphs, self.stage))
        lines = [
            f"{v.pass_name}: {v.wrong or ('bitwise equal' if v.difference == 0 else f'within {v.difference:.1e}')}"
            for v in verdicts
        ]
        wrong = next((v.pass_name for v in verdicts if v.wrong), None)
        if wrong is not None:
            lines.append(f"{wrong} changes the results; `--bisect` finds the rewrite")
        return "\n".join(lines), wrong is None


def _report_bad(number: int, rule: str, change: Change) -> str:
    old, new = (", ".join(f"{node.op} {node.node_id}" for node in nodes) for nodes in change)
    return (
        f"rewrite {number} is the first that changes a result: {rule} replaces {old} by {new}\n"
        f"before: --rewrite-limit {number - 1}; with it: --rewrite-limit {number}; without the rule: --disable {rule}"
    )


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name for name in text.split(",") if name]


def _layout(model: str, registry: Registry) -> tuple[ModelLayout, HFConfig]:
    """A layout by name, with its small config, or the layout of a checkpoint folder with the folder's config."""
    path = Path(model) / "config.json"
    if model in registry.models:
        layout = registry.models[model]
        return layout, HFConfig(layout.tiny, f"{layout.name}: tests.tiny")
    if not path.is_file():
        known = ", ".join(registry.models)
        raise ValueError(f"'{model}' is neither a model ({known}) nor a folder with a config.json")
    data = read_config_file(path)
    return layout_of(data, path, registry.models), HFConfig(data, str(path))


def _formatted(request: GraphRequest, graphs: dict[str, ExecutionGraph]) -> str:
    if request.format == "html":
        return to_html(graphs, title=f"{request.model}, {next(iter(graphs.values())).stage}")
    show = {"text": to_text, "json": to_json, "dot": to_dot, "mermaid": to_mermaid}[request.format]
    if len(graphs) == 1:
        return str(show(next(iter(graphs.values()))))
    return "\n".join(f"// after {name}\n{show(graph)}" for name, graph in graphs.items())


def _changes(states: list[tuple[str, ExecutionGraph]]) -> str:
    """A unified diff of the graph's text for each pass that changed it."""
    parts: list[str] = []
    for (before_name, before), (after_name, after) in pairwise(states):
        lines = difflib.unified_diff(
            to_text(before).splitlines(), to_text(after).splitlines(), before_name, after_name, n=0, lineterm=""
        )
        parts += lines
    return "\n".join(parts) or "no pass changed the graph"
