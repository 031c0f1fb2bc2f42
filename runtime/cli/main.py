"""The `sagellm` command. Each subcommand is imported when it runs, so that `sagellm --help` stays fast.

stdout is data, stderr is log. Exit codes: 0 fine, 1 failed, 2 wrong usage, 100 findings (lint, generate --check).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from sageLLM.runtime.inspect.expectations import MissedExpectation

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Specs = Annotated[
    list[Path] | None, typer.Option("--specs", help="An overlay spec folder; may be given several times.")
]
Kernels = Annotated[
    Literal["auto", "reference", "cpu", "triton"],
    typer.Option(help="What runs: the device's generated kernels, or the torch references."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command()
def generate(
    specs: Specs = None,
    out: Annotated[Path | None, typer.Option(help="Where the generated tree goes.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; report drift, exit 100 if any.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Write nothing; show what changes per model and stage.")] = False,
    json: Json = False,
) -> None:
    """Generate code from the specs: ops, builders, kernels, passes, docs, tests.

    Passes are held to the counts that their specs expect: a tree that misses one is not written.
    """
    from sageLLM.codegen.commands import Generate

    def count(tree: Path, is_overlay: bool) -> "list[MissedExpectation]":
        from sageLLM.runtime.inspect.expectations import missed_expectations

        return missed_expectations(tree, is_overlay)

    command = Generate(specs or [], out, as_json=json, count=count)
    if diff:
        from sageLLM.runtime.cli.graph import show_spec_diff

        raise typer.Exit(command.with_fresh_tree(show_spec_diff))
    raise typer.Exit(command.check() if check else command.write())


@app.command()
def lint(
    what: Annotated[str | None, typer.Argument(help="'model' or a layout's name: check a checkpoint's config.")] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json, or the checkpoint folder that holds it.")] = None,
    index: Annotated[Path | None, typer.Option(help="A model.safetensors.index.json to compare with.")] = None,
    tp: Annotated[str | None, typer.Option(help="Tensor-parallel degrees that must divide, by commas.")] = None,
    plugins: Annotated[list[Path] | None, typer.Option("--plugin", help="A generated folder to use as well.")] = None,
    specs: Specs = None,
    json: Json = False,
) -> None:
    """Check the specs, or what a checkpoint's config says: tensors, parameters, memory, degrees. Reads no weights."""
    if what is None and config is None:
        from sageLLM.codegen.commands import Generate

        raise typer.Exit(Generate(specs or [], None, as_json=json).lint())
    from sageLLM.runtime.cli.lint import LintRequest, lint_checkpoint

    raise typer.Exit(lint_checkpoint(LintRequest(what or "model", config, index, tp, plugins or [], as_json=json)))


@app.command()
def new(
    kind: Annotated[Literal["op", "model", "pass"], typer.Argument(help="What to add.")],
    name: Annotated[str, typer.Argument(help="Its name, in snake_case.")],
    specs: Annotated[Path | None, typer.Option(help="The spec folder to put it in (default: the package's).")] = None,
) -> None:
    """Start a new op, model or pass: an entry that already generates and passes its tests."""
    from sageLLM.codegen.commands import new_entry

    raise typer.Exit(new_entry(kind, name, specs))


@app.command()
def explain(
    name: Annotated[
        str, typer.Argument(help="An op, model, pass, rule, error code, generated file:line, or model:node.")
    ],
    stage: Annotated[
        Literal["prefill", "decode", "hybrid"], typer.Option(help="In which graph a node is looked for.")
    ] = "decode",
    specs: Specs = None,
    out: Annotated[Path | None, typer.Option(help="The generated tree that file:line refers to.")] = None,
) -> None:
    """Tell everything known of an op, model, pass, rule, error code, line of generated code or node of a graph."""
    model, _, node = name.partition(":")
    if model.isidentifier() and node and not node.isdigit():
        from sageLLM.runtime.cli.graph import show_node

        raise typer.Exit(show_node(model, stage, node))
    from sageLLM.codegen.commands import explain_name

    raise typer.Exit(explain_name(name, specs or [], out))


@app.command()
def graph(
    model: Annotated[
        str, typer.Argument(help="A model layout (its tiny config), a checkpoint folder, or a graph in a .txt file.")
    ],
    stage: Annotated[
        Literal["prefill", "decode", "hybrid"] | None,
        typer.Option(help="Which graph (default: decode if there is one)."),
    ] = None,
    level: Annotated[Literal["block", "kernel"], typer.Option(help="Before or after expansion.")] = "kernel",
    only: Annotated[str | None, typer.Option(help="Only these passes and rules, by commas; '' for none.")] = None,
    disable: Annotated[str, typer.Option(help="Leave these passes and rules out, by commas.")] = "",
    rewrite_limit: Annotated[int | None, typer.Option(min=0, help="Stop after so many rewrites.")] = None,
    print_ir_after: Annotated[str | None, typer.Option(help="Print the graph after this pass, or after 'all'.")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show what the passes changed, line by line.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Count what each rule did, and why it did not.")] = False,
    verify_numerics: Annotated[
        bool, typer.Option("--verify-numerics", help="Run the graph in float64 between passes; exit 1 if one differs.")
    ] = False,
    bisect: Annotated[bool, typer.Option("--bisect", help="Find the first rewrite that changes a result.")] = False,
    why_not: Annotated[
        tuple[str, str] | None, typer.Option(metavar="RULE NODE", help="Say why a rule did not fire at a node.")
    ] = None,
    format: Annotated[
        Literal["text", "json", "dot", "mermaid", "html", "trace"],
        typer.Option(help="html is a page with every pass of every stage, trace is for Perfetto."),
    ] = "text",
    hardware: Annotated[str, typer.Option(help="A device of specs/hardware, for estimated times.")] = "h100",
    measure: Annotated[
        bool, typer.Option("--measure", help="In a trace, measured times beside the estimates.")
    ] = False,
    plugins: Annotated[list[Path] | None, typer.Option("--plugin", help="A generated folder to use as well.")] = None,
) -> None:
    """Print a model's execution graph, and what its passes do to it."""
    from sageLLM.runtime.cli.graph import GraphRequest, show_graph

    request = GraphRequest(
        model,
        stage,
        level,
        only,
        disable,
        rewrite_limit,
        print_ir_after,
        diff,
        stats,
        verify_numerics,
        bisect,
        why_not,
        format,
        hardware,
        measure,
        plugins or [],
    )
    raise typer.Exit(show_graph(request))


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder.")],
    prompt: Annotated[list[str], typer.Option(help="A prompt; may be given several times.")],
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    pd: Annotated[
        Literal["strict", "time_share", "hybrid", "auto"], typer.Option(help="How prefill and decode share.")
    ] = "hybrid",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    kernels: Kernels = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence, in tokens.")] = None,
    plugins: Annotated[list[Path] | None, typer.Option("--plugin", help="A generated folder to use as well.")] = None,
    json: Json = False,
) -> None:
    """Complete prompts with a checkpoint."""
    from sageLLM.runtime.cli.run import RunRequest, run_prompts

    request = RunRequest(
        model, prompt, max_tokens, temperature, seed, pd, dtype, kernels, max_model_len, plugins or [], as_json=json
    )
    raise typer.Exit(run_prompts(request))


@app.command()
def simulate(
    trace: Annotated[Path | None, typer.Option(help="Azure csv, Mooncake jsonl, or JSON pairs of lengths.")] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="strict, time_share, hybrid, vllm, auto; may be repeated. Without it, all."),
    ] = None,
    model: Annotated[str, typer.Option(help="A config.json, or the name of a model in --profile.")] = "config.json",
    hardware: Annotated[str, typer.Option(help="A device of specs/hardware.")] = "h100",
    tp: Annotated[int, typer.Option(min=1, help="Devices that one worker spans.")] = 1,
    profile: Annotated[Path | None, typer.Option(help="Measured latencies instead of the roofline.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second, Poisson; else the trace's times.")] = None,
    num_requests: Annotated[int | None, typer.Option(min=1, help="The first so many of the trace.")] = None,
    prompt: Annotated[tuple[float, float], typer.Option(help="Without a trace: median and p90 of prompts.")] = (
        1020,
        2734,
    ),
    output: Annotated[tuple[float, float], typer.Option(help="Without a trace: median and p90 of answers.")] = (
        129,
        424,
    ),
    seed: Annotated[int, typer.Option(help="Of the arrivals and the drawn lengths.")] = 0,
    slo_ttft: Annotated[float, typer.Option(help="Objective for the first token, seconds.")] = 1.0,
    slo_tpot: Annotated[float, typer.Option(help="Objective for each token after it, seconds.")] = 0.1,
    prefill_workers: Annotated[int, typer.Option(min=1, help="Prefill workers of strict mode.")] = 1,
    decode_workers: Annotated[int, typer.Option(min=0, help="Its decode workers; other modes use the sum.")] = 1,
    chunk_size: Annotated[int, typer.Option(min=1, help="Prompt tokens of a hybrid step.")] = 512,
    max_prefill_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a prefill step.")] = 4096,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Requests in a step.")] = 256,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a KV block.")] = 16,
    num_blocks: Annotated[int | None, typer.Option(min=1, help="KV blocks of a worker; else what fits.")] = None,
    json: Json = False,
) -> None:
    """Play a trace of requests through the scheduler and compare its modes; needs no device and no weights."""
    from sageLLM.runtime.cli.simulate import SimulateRequest, run_simulation
    from sageLLM.runtime.sim.metrics import Slo

    request = SimulateRequest(
        trace,
        mode or [],
        model,
        hardware,
        tp,
        profile,
        rate,
        num_requests,
        prompt,
        output,
        seed,
        Slo(slo_ttft, slo_tpot),
        prefill_workers,
        decode_workers,
        chunk_size,
        max_prefill_tokens,
        max_batch_size,
        block_size,
        num_blocks,
        as_json=json,
    )
    raise typer.Exit(run_simulation(request))


@app.command()
def embed(
    model: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder.")],
    prompt: Annotated[list[str], typer.Option(help="A text; may be given several times.")],
    pooling: Annotated[
        Literal["model", "first", "last", "mean", "none"] | None,
        typer.Option(help="Which vector stands for a text (default: what the folder or the layout says)."),
    ] = None,
    normalize: Annotated[bool | None, typer.Option(help="Divide by the length, so that products are cosines.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    kernels: Kernels = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest text, in tokens.")] = None,
    plugins: Annotated[list[Path] | None, typer.Option("--plugin", help="A generated folder to use as well.")] = None,
) -> None:
    """Print the embeddings of texts, a JSON line each."""
    from sageLLM.runtime.cli.run import EmbedRequest, embed_prompts

    request = EmbedRequest(model, prompt, pooling, normalize, dtype, kernels, max_model_len, plugins or [])
    raise typer.Exit(embed_prompts(request))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
