"""The `sagellm` command. Each subcommand is imported when it runs, so that `sagellm --help` stays fast.

Data goes to stdout, logs to stderr. Exit codes: 0 success, 1 failure, 2 usage error, 100 findings (lint, drift).
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sageLLM.runtime.cli.bench_commands import bench_app
from sageLLM.runtime.cli.checkpoint_commands import convert, quantize
from sageLLM.runtime.cli.deploy_commands import deploy, plan
from sageLLM.runtime.cli.dynamo_command import dynamo_worker
from sageLLM.runtime.cli.engine_options import EMBEDDING_OPTIONS, EngineOptions, with_engine_options
from sageLLM.runtime.cli.options import with_request
from sageLLM.runtime.cli.serve_options import with_serve_options
from sageLLM.runtime.cli.simulate_request import SimulateRequest
from sageLLM.runtime.cli.worker_command import worker
from sageLLM.runtime.server.settings import ServerSettings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
RUN, SPECS, CHECKPOINTS = "Run and serve models", "Specs, generated code and graphs", "Checkpoints"
DEPLOYMENTS, MEASURE = "Deployments", "Measure and simulate"
"""The groups of commands in the help, in the order of their first commands."""

Specs = Annotated[list[Path] | None, typer.Option("--specs", help="An overlay spec folder; can be repeated.")]
Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="An additional generated folder; can be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command(rich_help_panel=SPECS)
def generate(
    specs: Specs = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the generated tree.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; report drift, exit 100 if any.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Write nothing; show the changes per model and stage.")] = False,
    json: Json = False,
) -> None:
    """Generate code from the specs: ops, builders, kernels, passes, docs, tests.

    A tree is not written if a pass misses a count that its spec expects.
    """
    from sageLLM.codegen.commands import Generate
    from sageLLM.runtime.cli.counting import missed_expectations

    command = Generate(specs or [], out, as_json=json, count=missed_expectations)
    if diff:
        from sageLLM.runtime.cli.spec_diff import show_spec_diff

        raise typer.Exit(command.with_fresh_tree(show_spec_diff))
    raise typer.Exit(command.check() if check else command.write())


@app.command(rich_help_panel=SPECS)
def lint(
    what: Annotated[
        str | None, typer.Argument(help="'model' or a layout's name, to check a checkpoint's config.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json, or the checkpoint folder that holds it.")] = None,
    index: Annotated[Path | None, typer.Option(help="A model.safetensors.index.json to compare with.")] = None,
    tp: Annotated[str | None, typer.Option(help="Tensor-parallel degrees to check, separated by commas.")] = None,
    plugins: Plugins = None,
    specs: Specs = None,
    json: Json = False,
) -> None:
    """Check the specs, or a checkpoint's config (tensors, parameters, memory, tp degrees) without reading weights."""
    if what is None and config is None:
        from sageLLM.codegen.commands import Generate

        raise typer.Exit(Generate(specs or [], None, as_json=json).lint())
    from sageLLM.runtime.cli.lint import LintRequest, lint_checkpoint

    raise typer.Exit(lint_checkpoint(LintRequest(what or "model", config, index, tp, plugins or [], as_json=json)))


@app.command(rich_help_panel=SPECS)
def new(
    kind: Annotated[
        Literal["op", "model", "pass", "format", "dialect", "deploy"], typer.Argument(help="The kind of the new entry.")
    ],
    name: Annotated[str, typer.Argument(help="Its name, in snake_case.")],
    specs: Annotated[
        Path | None, typer.Option(help="The spec folder for it (default: that of a checkout, else my_specs here).")
    ] = None,
) -> None:
    """Add a new op, model, pass, format or dialect that generates and passes its tests, or a deployment."""
    from sageLLM.codegen.commands import new_entry

    raise typer.Exit(new_entry(kind, name, specs))


@app.command(rich_help_panel=SPECS)
def explain(
    name: Annotated[
        str,
        typer.Argument(help="An op, model, pass, rule, device, dialect, deployment, code, file:line, model:node."),
    ],
    stage: Annotated[
        Literal["prefill", "decode", "hybrid"], typer.Option(help="The stage of the graph, for model:node.")
    ] = "decode",
    specs: Specs = None,
    out: Annotated[Path | None, typer.Option(help="The generated tree that file:line refers to.")] = None,
) -> None:
    """Explain an op, model, pass, rule, dialect, deployment, error code, line of generated code or node of a graph."""
    model, _, node = name.partition(":")
    if model.isidentifier() and node and not node.isdigit():
        from sageLLM.runtime.cli.graph import show_node

        raise typer.Exit(show_node(model, stage, node))
    from sageLLM.codegen.commands import explain_name

    raise typer.Exit(explain_name(name, specs or [], out))


@app.command(rich_help_panel=SPECS)
def graph(
    model: Annotated[
        str,
        typer.Argument(help="A layout's name (for its tiny config), a checkpoint folder, or a graph in a .txt file."),
    ],
    stage: Annotated[
        Literal["prefill", "decode", "hybrid"] | None,
        typer.Option(help="The stage of the graph (default: decode if the model has it)."),
    ] = None,
    level: Annotated[Literal["block", "kernel"], typer.Option(help="Before or after expansion.")] = "kernel",
    only: Annotated[str | None, typer.Option(help="Passes and rules to run, separated by commas; '' for none.")] = None,
    disable: Annotated[str, typer.Option(help="Passes and rules to skip, separated by commas.")] = "",
    rewrite_limit: Annotated[int | None, typer.Option(min=0, help="Stop after this number of rewrites.")] = None,
    print_ir_after: Annotated[str | None, typer.Option(help="Print the graph after this pass, or after 'all'.")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show the changes of the passes, line by line.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Count the rewrites and near misses of each rule.")] = False,
    verify_numerics: Annotated[
        bool,
        typer.Option("--verify-numerics", help="Run the graph in float64 after every pass; exit 1 on a difference."),
    ] = False,
    bisect: Annotated[bool, typer.Option("--bisect", help="Find the first rewrite that changes a result.")] = False,
    why_not: Annotated[
        tuple[str, str] | None, typer.Option(metavar="RULE NODE", help="Show why a rule did not fire at a node.")
    ] = None,
    format: Annotated[
        Literal["text", "json", "dot", "mermaid", "html", "trace"],
        typer.Option(help="html: a page with every pass of every stage; trace: for Perfetto."),
    ] = "text",
    hardware: Annotated[
        str | None, typer.Option(help="A device of specs/hardware, for estimated times (default: h100, or cpu).")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run the graph here; planned and measured times, side by side.")
    ] = False,
    tensor_parallel_size: Annotated[int, typer.Option(help="The graph of one of so many ranks.", min=1)] = 1,
    plugins: Plugins = None,
) -> None:
    """Print a model's execution graph and the effect of its passes."""
    from sageLLM.runtime.cli.graph import GraphRequest, show_graph

    request = GraphRequest(
        model=model,
        stage=stage,
        level=level,
        only=only,
        disable=disable,
        rewrite_limit=rewrite_limit,
        print_ir_after=print_ir_after,
        diff=diff,
        stats=stats,
        verify_numerics=verify_numerics,
        bisect=bisect,
        why_not=why_not,
        format=format,
        hardware=hardware,
        measure=measure,
        tensor_parallel_size=tensor_parallel_size,
        plugins=plugins or [],
    )
    raise typer.Exit(show_graph(request))


@app.command(rich_help_panel=RUN)
@with_engine_options()
def run(
    model: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder, or a GGUF file.")],
    prompt: Annotated[list[str], typer.Option(help="A prompt; can be repeated.")],
    max_tokens: Annotated[int, typer.Option(help="Length of the longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler, for reproducible answers.")] = None,
    json: Json = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print time, bytes, operations and fraction of the limit of each op.")
    ] = False,
    hardware: Annotated[
        str | None, typer.Option(help="Limits for the profile: a device or a .yaml file (default: measured now).")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print the kernel of each form of weights, and why.")
    ] = False,
    *,
    engine: EngineOptions,
) -> None:
    """Complete prompts with a checkpoint."""
    from sageLLM.runtime.cli.run import RunRequest, run_prompts

    request = RunRequest(
        model=model,
        prompts=prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        engine=engine,
        as_json=json,
        profile=profile,
        hardware=hardware,
        verbose=verbose,
    )
    raise typer.Exit(run_prompts(request))


@app.command(rich_help_panel=RUN)
@with_serve_options
def serve(settings: ServerSettings, engine: EngineOptions) -> None:
    """Serve a checkpoint over HTTP, with OpenAI's API."""
    from sageLLM.runtime.cli.serve import serve_model

    raise typer.Exit(serve_model(settings, engine))


@app.command(rich_help_panel=RUN)
def chat(
    url: Annotated[str, typer.Option(help="URL of a running server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Name of the model (default: the first one served).")] = None,
    system: Annotated[str | None, typer.Option("--system-prompt", help="A system message at the beginning.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Length of the longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")] = None,
    api_key: Annotated[str | None, typer.Option(help="API key of the server.", envvar="SAGELLM_API_KEY")] = None,
    quick: Annotated[str | None, typer.Option("--quick", "-q", help="Ask one question, and end.")] = None,
) -> None:
    """Talk to a model of a running server in the terminal."""
    from sageLLM.runtime.cli.chat import ChatRequest
    from sageLLM.runtime.cli.chat import chat as run_chat

    raise typer.Exit(run_chat(ChatRequest(url, model, system, max_tokens, temperature, api_key, quick)))


@app.command(rich_help_panel=RUN)
def status(
    url: Annotated[str, typer.Option(help="URL of a running server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(help="API key of the server.", envvar="SAGELLM_API_KEY")] = None,
) -> None:
    """Print the requests of a running server, and role, state and load of its workers."""
    from sageLLM.runtime.cli.status import print_status

    raise typer.Exit(print_status(url, api_key))


@app.command(rich_help_panel=RUN)
def set_role(
    number: Annotated[int, typer.Argument(help="Number of the worker, as `sagellm status` prints it.", min=0)],
    role: Annotated[Literal["prefill", "decode"], typer.Argument(help="Its next role.")],
    url: Annotated[str, typer.Option(help="URL of a running server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(help="Administrator's key of the server.", envvar="SAGELLM_ADMIN_API_KEY")
    ] = None,
) -> None:
    """Let a prefill or decode worker of a running server finish its requests and take another role."""
    from sageLLM.runtime.cli.set_role import set_worker_role

    raise typer.Exit(set_worker_role(url, api_key, number, role))


@app.command(rich_help_panel=RUN)
def doctor(
    model: Annotated[Path | None, typer.Option(help="A checkpoint folder to load and try.")] = None,
    url: Annotated[str | None, typer.Option(help="A running server to ask.")] = None,
    json: Json = False,
) -> None:
    """Check this machine and the installation, and a checkpoint or a server if named."""
    from sageLLM.runtime.cli.doctor import doctor as run_doctor

    raise typer.Exit(run_doctor(model, url, as_json=json))


@app.command(rich_help_panel=RUN)
def cache(
    clear: Annotated[
        Literal["kernels", "weights", "gguf", "all"] | None,
        typer.Option(help="Delete this part, which is made again when it is needed."),
    ] = None,
    json: Json = False,
) -> None:
    """Print the sizes of compiled kernels, packed weights and GGUF headers in the user's cache, or delete them."""
    from sageLLM.runtime.cli.cache import show_cache

    raise typer.Exit(show_cache(clear, as_json=json))


@app.command(rich_help_panel=MEASURE)
@with_request(SimulateRequest)
def simulate(request: SimulateRequest) -> None:
    """Simulate a trace of requests in the scheduler's modes and compare them; requires no device and no weights."""
    from sageLLM.runtime.cli.simulate import run_simulation

    raise typer.Exit(run_simulation(request))


@app.command(rich_help_panel=MEASURE)
def calibrate(
    tables: Annotated[
        list[Path],
        typer.Option(help="Measured kernel times: a profile folder, a parquet folder, mlp.csv, or all_reduce.csv."),
    ],
    hardware: Annotated[str, typer.Option(help="A device of specs/hardware, or a .yaml file.")],
    model: Annotated[
        list[str] | None, typer.Option(help="The config.json of each profile folder's model, in the same order.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree of the profile folders.")] = 1,
    fit: Annotated[bool, typer.Option("--fit", help="Fit the efficiencies, and print them as YAML.")] = False,
    json: Json = False,
) -> None:
    """Compare a hardware entry with measured kernel times, by kernel family, or fit its efficiencies to them."""
    from sageLLM.runtime.cli.calibrate import CalibrateRequest, run_calibration

    request = CalibrateRequest(
        hardware=hardware,
        tables=tables,
        models=model or [],
        tensor_parallel_size=tp,
        fits=fit,
        as_json=json,
    )
    raise typer.Exit(run_calibration(request))


@app.command(rich_help_panel=RUN)
@with_engine_options(*EMBEDDING_OPTIONS)
def embed(
    model: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder.")],
    prompt: Annotated[list[str], typer.Option(help="A text; can be repeated.")],
    pooling: Annotated[
        Literal["model", "first", "last", "mean", "none"] | None,
        typer.Option(help="Pooling of token vectors to one vector (default: that of the folder or layout)."),
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option(help="Scale to unit length, so that dot products are cosine similarities.")
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Prompt of the folder before each text (default: the folder's; '' for none).")
    ] = None,
    *,
    engine: EngineOptions,
) -> None:
    """Print the embeddings of texts, one JSON line each."""
    from sageLLM.runtime.cli.run import EmbedRequest, embed_prompts

    request = EmbedRequest(
        model=model,
        prompts=prompt,
        pooling=pooling,
        normalize=normalize,
        prompt_name=prompt_name,
        engine=engine,
    )
    raise typer.Exit(embed_prompts(request))


app.add_typer(bench_app, name="bench", rich_help_panel=MEASURE)
for panel, commands in {CHECKPOINTS: (convert, quantize), DEPLOYMENTS: (deploy, plan, worker, dynamo_worker)}.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
