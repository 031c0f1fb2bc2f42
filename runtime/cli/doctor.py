"""`sagellm doctor`: checks of this machine, of the installation, and of a checkpoint or a server if one is named."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

Level = Literal["ok", "warning", "error"]
EXTRAS = {
    "serve": ("starlette", "uvicorn", "prometheus-client"),
    "calibration": ("pyarrow",),
    "kv-events": ("pyzmq",),
    "gpu": ("triton",),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `remedy` is set unless all is well."""

    level: Level
    topic: str
    text: str
    remedy: str = ""


def doctor(model: Path | None, url: str | None, *, as_json: bool) -> int:
    """Prints the findings; exit code 1 if one of them is an error."""
    findings = list(_findings(model, url))
    if as_json:
        print(json.dumps([asdict(one) for one in findings]))
    else:
        for one in findings:
            print(f"{one.level:<8} {one.topic:<12} {one.text}" + (f"; {one.remedy}" if one.remedy else ""))
    return int(any(one.level == "error" for one in findings))


def _findings(model: Path | None, url: str | None) -> Iterator[Finding]:
    checks: list[Callable[[], Iterator[Finding]]] = [_python, _torch, _memory, _compiler, _extras]
    if model is not None:
        checks.append(lambda: _model(model))
    if url is not None:
        checks.append(lambda: _server(url))
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # a check that fails is a finding, and the others still run
            name = getattr(check, "__name__", "check").lstrip("_<").rstrip(">")
            yield Finding("error", name, f"{type(error).__name__}: {error}", "report this")


def _python() -> Iterator[Finding]:
    machine = f"{platform.system()} {platform.machine()}"
    yield Finding("ok", "python", f"Python {platform.python_version()} on {machine}, sageLLM {_version('sagellm')}")


def _torch() -> Iterator[Finding]:
    import torch

    yield Finding("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        yield Finding("ok", "device", torch.cuda.get_device_name(0))
    else:
        yield Finding("ok", "device", "none found; the engine runs on the CPU")
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.get_num_threads() > num_cores:
        remedy = f"set OMP_NUM_THREADS={num_cores}"
        yield Finding("warning", "threads", f"{torch.get_num_threads()} threads for {num_cores} cores", remedy)


def _memory() -> Iterator[Finding]:
    path = Path("/proc/meminfo")
    if not path.exists():
        return
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in path.read_text().splitlines()}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB available"
    if free < 2**30:
        yield Finding("warning", "memory", text, "the default KV cache has up to 1 GiB; lower num_kv_blocks")
    else:
        yield Finding("ok", "memory", text)


def _compiler() -> Iterator[Finding]:
    from sageLLM.runtime.kernels.cpu.cache import private_folder
    from sageLLM.runtime.kernels.cpu.compiler import find_compiler

    compiler = find_compiler()
    if compiler is None:
        remedy = "install g++ or clang++, or set CXX; without one the torch references run"
        yield Finding("warning", "compiler", "no C++ compiler", remedy)
        return
    yield Finding("ok", "compiler", f"{' '.join(compiler.command)}, {compiler.version.splitlines()[0]}")
    try:
        yield Finding("ok", "kernel cache", str(private_folder()))
    except OSError as error:
        remedy = "every process compiles the kernels; set SAGELLM_CACHE_DIR"
        yield Finding("warning", "kernel cache", str(error), remedy)


def _extras() -> Iterator[Finding]:
    for extra, packages in EXTRAS.items():
        versions = {name: _version(name) for name in packages}
        if missing := [name for name, found in versions.items() if found == "none"]:
            text = f"without {', '.join(missing)}"
            yield Finding("ok", extra, text, f"pip install 'sagellm[{extra}]' if you need it")
        else:
            yield Finding("ok", extra, ", ".join(f"{name} {found}" for name, found in versions.items()))


def _model(folder: Path) -> Iterator[Finding]:
    """Loads the checkpoint, and generates one token."""
    from sageLLM.runtime.engine.llm import LLM
    from sageLLM.runtime.errors import SageError
    from sageLLM.runtime.registry.plugins import load_dialects
    from sageLLM.runtime.sampling.sampling_params import SamplingParams
    from sageLLM.runtime.server.dialects import choose_dialects

    start = time.perf_counter()
    try:
        llm = LLM(folder)
    except (SageError, OSError) as error:
        yield Finding("error", "model", str(error), "see docs/checkpoints.md")
        return
    seconds = time.perf_counter() - start
    text = f"{llm.model.layout.name}, {llm.model.num_parameters:,} parameters, loaded in {seconds:.1f} s"
    yield Finding("ok", "model", text)
    if not llm.model.generates:
        return
    yield Finding("ok", "kv cache", str(llm.kv_cache_size))
    start = time.perf_counter()
    answer = llm.generate([[0]], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))[0].outputs[0]
    if answer.finish_reason != "length":
        yield Finding("error", "generation", str(answer.stop_reason), "check the weights")
        return
    python = len({op for stats in llm.kernel_stats() for op in stats.in_python})
    yield Finding("ok", "generation", f"2 tokens in {time.perf_counter() - start:.2f} s; {python} ops run in Python")
    if llm.tokenizer is not None and llm.tokenizer.chat_templates:
        found = choose_dialects(load_dialects(), "\n".join(llm.tokenizer.chat_templates.values()), None, None)
        yield Finding("ok", "dialect", f"{found.for_calls}; {found.for_reasoning}")
    if llm.tokenizer is not None and not llm.tokenizer.chat_templates:
        yield Finding(
            "warning", "chat", "the checkpoint comes without a chat template", "serve with --chat-template FILE"
        )


def _server(url: str) -> Iterator[Finding]:
    from sageLLM.runtime.server.http_client import Address, Connection, HttpError

    try:
        address = Address.of(url.removesuffix("/").removesuffix("/v1"))
        models = asyncio.run(Connection(address).json("GET", "/v1/models"))
    except (HttpError, OSError, ValueError) as error:
        yield Finding("error", "server", str(error), "start it with sagellm serve")
        return
    names = ", ".join(card["id"] for card in models["data"])
    yield Finding("ok", "server", f"{url} serves {names}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
