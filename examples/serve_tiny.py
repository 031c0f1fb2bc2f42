"""Serves eight prompts with the bundled tiny model in hybrid mode and prints completions and timings: `make run`.

The model was trained on the Python standard library (see `train_tiny_model.py`); it completes Python code.
"""

import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.inspect.export import to_html

HERE = Path(__file__).resolve().parent
MODEL = HERE / "tiny_python_model"
VIEW = Path("out/graphs.html")
PARAMS = SamplingParams(max_tokens=48, temperature=0.0)


def main() -> None:
    prompts = (HERE / "prompts.txt").read_text(encoding="utf-8").split("\n---\n")
    start = time.perf_counter()
    llm = LLM(MODEL, dtype="float32", scheduler=PDSchedulerConfig(mode="hybrid", prefill_chunk_size=32))
    print(f"loaded {MODEL.name}: {llm.model.num_parameters:,} parameters in {time.perf_counter() - start:.2f} s\n")

    start = time.perf_counter()
    outputs = show_progress(llm.stream(prompts, PARAMS), len(prompts))
    seconds = time.perf_counter() - start
    for output in outputs:
        print_completion(output)
    print_latencies(outputs, seconds, llm.engine.num_steps)
    print_passes(llm)
    VIEW.parent.mkdir(exist_ok=True)
    VIEW.write_text(view_of(llm), encoding="utf-8")
    print(f"\ngraphs: {VIEW.resolve()}")


def show_progress(states: Iterable[RequestOutput], num_requests: int) -> list[RequestOutput]:
    """Draws the stream on a terminal, one row per request. Returns the finished outputs."""
    latest: dict[str, RequestOutput] = {}
    for state in states:
        latest[state.request_id] = state
        if sys.stdout.isatty():
            _draw(latest, num_requests)
    if sys.stdout.isatty():
        print("\n" * num_requests)
    return [latest[request_id] for request_id in sorted(latest, key=int)]


def _draw(latest: dict[str, RequestOutput], num_rows: int) -> None:
    rows = []
    for row in range(num_rows):
        state = latest.get(str(row))
        tail = " ".join(state.outputs[0].text.split())[-70:] if state else ""
        count = len(state.outputs[0].token_ids) if state else 0
        rows.append(f"\x1b[2K{row}: {count:>3} tokens  {tail}")
    print("\n".join(rows) + f"\x1b[{num_rows - 1}A\r", end="", flush=True)


def print_completion(output: RequestOutput) -> None:
    answer = output.outputs[0]
    print(f"--- {output.request_id} ({len(answer.token_ids)} tokens, {answer.finish_reason})")
    print(f"{output.prompt}\x1b[1m{answer.text}\x1b[0m" if sys.stdout.isatty() else f"{output.prompt}{answer.text}")


def print_latencies(outputs: Sequence[RequestOutput], seconds: float, num_steps: int) -> None:
    ttfts = [output.metrics.ttft for output in outputs if output.metrics and output.metrics.ttft is not None]
    tpots = [output.metrics.tpot for output in outputs if output.metrics and output.metrics.tpot is not None]
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"\n{len(outputs)} requests, {num_tokens} tokens in {num_steps} steps and {seconds:.2f} s")
    print(f"throughput  {num_tokens / seconds:8.1f} tokens/s")
    print(f"TTFT        {1e3 * statistics.median(ttfts):8.1f} ms median, {1e3 * max(ttfts):.1f} ms worst")
    print(f"TPOT        {1e3 * statistics.median(tpots):8.1f} ms median, {1e3 * max(tpots):.1f} ms worst")


def print_passes(llm: LLM) -> None:
    """The rewrites of each stage's graph; `sagellm graph llama --stats` also prints near misses."""
    print("\npasses over the graphs of this run")
    for stage, reports in llm.compiler.reports.items():
        fired = [f"{rule} {stats.fired}" for report in reports for rule, stats in report.rules.items() if stats.fired]
        nodes = f"{reports[0].nodes_before} -> {reports[-1].nodes_after} nodes"
        print(f"  {stage:<8} {nodes} in {1e3 * sum(r.seconds for r in reports):.1f} ms: {', '.join(fired)}")


def view_of(llm: LLM) -> str:
    """One self-contained HTML page with the block graph and the optimised kernel graph of each stage."""
    graphs = {}
    for stage in ("prefill", "decode", "hybrid"):
        graphs[f"{stage}: blocks"] = llm.compiler.block_graph(stage)
        graphs[f"{stage}: kernels"] = llm.compiler.kernel_graph(stage)
    return to_html(graphs, title=f"{llm.model.layout.name}: execution graphs")


if __name__ == "__main__":
    main()
