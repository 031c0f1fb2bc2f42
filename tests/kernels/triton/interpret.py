"""Runs everything that needs Triton's interpreter in one process, and prints each finding as a line of JSON.

    python interpret.py sample 1234        a random sample of the checks, with the seed 1234
    python interpret.py everything         all of them, with a new seed

The process is separate, because TRITON_INTERPRET must be set before Triton is imported.
"""

import importlib
import io
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import checks
import kv_checks
import torch
from compare import Finding
from triton.runtime.interpreter import GridExecutor

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.generated.kernels.triton import KERNELS
from sageLLM.runtime.core.model.kv_form import KV_FORMS
from sageLLM.runtime.kernels.triton_interpreter import patch_interpreter
from sageLLM.runtime.quantize.checkpoint import quantize_checkpoint
from sageLLM.runtime.quantize.scheme import Scheme
from sageLLM.runtime.registry.plugins import load_registry

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "examples/tiny_python_model"
BENCHMARK = ROOT / "benchmarks/gpu_parts.py"


def findings(everything: bool) -> Iterator[Finding]:
    run = set()
    for finding in checks.findings(everything):
        run.add(finding.op)
        yield finding
    yield from kv_checks.findings(everything)
    yield from (Finding(op, "", "", 0.0, "was not run") for op in KERNELS if op not in run)
    yield from engine_findings(3 if everything else 2)
    yield coded_engine_finding(2)
    yield coded_cache_finding(2, [*KV_FORMS] if everything else [random.choice([*KV_FORMS])])
    yield routing_finding()
    yield benchmark_finding(everything)


def engine_findings(num_tokens: int) -> Iterator[Finding]:
    """The engine generates the same tokens with Triton kernels as with the references, in bf16, in few launches."""
    tokens = []
    launched: list[str] = []
    for kernels in ("reference", "triton"):
        llm = LLM(model=MODEL, kernels=kernels)
        with recorded_launches(launched):
            [request] = llm.generate(["import os\nimport "], SamplingParams(max_tokens=num_tokens, temperature=0.0))
        tokens.append(request.outputs[0].token_ids)
    yield Finding("engine", str(tokens), "bf16", 0.0, "" if tokens[0] == tokens[1] else "other tokens")
    ends = [number for number, name in enumerate(launched) if name == "_lm_head_sample_merge"]
    step = launched[ends[-2] + 1 : ends[-1] + 1]
    allowed = LAUNCHES_PER_LAYER * llm.model.config.L + LAUNCHES_PER_STEP
    yield Finding("engine", "launches", "bf16", 0.0, "" if len(step) <= allowed else f"{len(step)} launches: {step}")


def coded_engine_finding(num_tokens: int) -> Finding:
    """A checkpoint of 4 bits: its weights stay codes, and its tokens are those of the references on floats."""
    tokens, kernels = [], ("reference", "triton")
    with tempfile.TemporaryDirectory() as name:
        out = Path(name, "quantized")
        registry = load_registry()
        quantize_checkpoint(MODEL, out, Scheme.parse("int4-g32", registry.methods), registry)
        engines = [LLM(model=out, kernels=choice) for choice in kernels]
        for llm in engines:
            [request] = llm.generate(["import os\nimport "], SamplingParams(max_tokens=num_tokens, temperature=0.0))
            tokens.append(request.outputs[0].token_ids)
        forms = {one.form for one in engines[1].weight_stats()}
    wrong = "" if tokens[0] == tokens[1] else "other tokens"
    return Finding("engine", f"codes {tokens}", "bf16", 0.0, wrong if "int4 in groups of 32" in forms else str(forms))


def coded_cache_finding(num_tokens: int, forms: Sequence[str]) -> Finding:
    """KV caches of codes: the tokens of a prompt in two chunks are those of the references."""
    found, chunks = {}, PDSchedulerConfig(max_prefill_tokens=8)
    for form, kernels in product(forms, ("reference", "triton")):
        llm = LLM(model=MODEL, kernels=kernels, kv_cache_dtype=form, scheduler=chunks)
        [request] = llm.generate([list(range(20, 32))], SamplingParams(max_tokens=num_tokens, temperature=0.0))
        found[form, kernels] = request.outputs[0].token_ids
    is_same = all(found[form, "triton"] == found[form, "reference"] for form in forms)
    return Finding("engine", "KV codes", "bf16", 0.0, "" if is_same else f"other tokens: {found}")


def routing_finding() -> Finding:
    """A layer of experts makes its routing table once for both products, and a dense layer none.

    A step with no more pairs of a row and an expert than experts needs none: here the one with the longest request.
    """
    sys.path.append(str(ROOT))
    conftest = importlib.import_module("tests.conftest")
    sizes = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    config = conftest.small_config({**sizes, "mlp_only_layers": [1]})
    prompts, lengths = [[5, 7, 11], [6, 8], [9]], [2, 2, 3]  # steps of 12, 6 and 2 pairs
    params = [SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True) for length in lengths]
    tokens, launched = [], []
    with tempfile.TemporaryDirectory() as name:
        conftest.save_random_model(Path(name), "Qwen3Moe", 0, "5GB", config)
        for kernels in ("reference", "triton"):
            llm = LLM(model=name, kernels=kernels, skip_tokenizer=True)
            with recorded_launches(launched):
                tokens.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    steps = " ".join(launched).split("_lm_head_sample_merge")[:-1]
    names = ("_routing_kernel", "_expert_linear_kernel", "_expert_down_kernel")
    counts = [[step.split().count(one) for one in names] for step in steps]
    wrong = "" if tokens[0] == tokens[1] else f"other tokens: {tokens}"
    wrong += "" if counts == [[2, 2, 2], [2, 2, 2], [0, 2, 2]] else f"launches per step of {names}: {counts}"
    return Finding("engine", "routing tables", "f32", 0.0, wrong)


LAUNCHES_PER_LAYER = 6
"""Four GEMMs, of which two begin with the residual and the norm, the store of keys and values, attention."""
LAUNCHES_PER_STEP = 5
"""Embedding, the rows that sample, the last norm, the LM head, the merge of its maxima."""


@contextmanager
def recorded_launches(names: list[str]) -> Iterator[None]:
    original = GridExecutor.__call__

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    GridExecutor.__call__ = record
    try:
        yield
    finally:
        GridExecutor.__call__ = original


def benchmark_finding(everything: bool) -> Finding:
    """A dry run of benchmarks/gpu.py, in this process: the same calls as on a GPU, on tiny sizes."""
    names = ["ceilings", "launchers", "decode", "linear", "prefill", "others", "ranks"]
    names += ["engine", "checks"] if everything else []
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        rows = Path(folder, "rows")
        sys.path.append(str(BENCHMARK.parent))
        part = importlib.import_module("gpu_parts")
        part.main([*names, "--dry-run", "--rows", str(rows)])
        found = [json.loads(line) for line in rows.read_text().splitlines()]
    bad = [row for row in found if "error" in row or row.get("is_right") is False or row.get("are_equal") is False]
    missing = {*names} - {row["part"] for row in found}
    return Finding("benchmarks/gpu.py", "dry run", "bf16", 0.0, str(bad or missing or ""))


def main(extent: str, seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    patch_interpreter()
    for finding in findings(extent == "everything"):
        json.dump(asdict(finding), sys.stdout)
        print()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else random.getrandbits(32))
