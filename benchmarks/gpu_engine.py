"""Parts of `gpu.py` that run the engine on checkpoints of random weights."""

import gc
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_table import Table
from safetensors.torch import save_file

from sageLLM import LLM, SamplingParams

TOKENIZER = Path(__file__).parents[1] / "examples/tiny_python_model"
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256}  # fmt: skip
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048}  # fmt: skip
GOALS = {"1B": 0.75, "8B": 0.82}
"""Fractions of the ceiling of batch 1: the bytes of the weights at the measured rate of a copy."""


def engine(table: Table) -> None:
    """Rates at two lengths of the model, tokens with and without graphs, a profiled step, and transformers beside."""
    if table.is_dry:
        with checkpoint(TINY, 256) as folder:
            measure_model(table, "tiny", folder, (1,), 2)
            profile(table, "tiny", folder, 2)
        return
    for positions in (4096, 131072):
        with checkpoint(LLAMA_1B, positions) as folder:
            measure_model(table, "1B", folder, (1, 32), 128)
            if positions == 4096:
                profile(table, "1B", folder, 32)
                table.add("1B, transformers, batch 1", lambda folder=folder: transformers_rate(folder, 64))
    with checkpoint(LLAMA_8B, 4096) as folder:
        measure_model(table, "8B", folder, (1, 64), 64)


def ranks(table: Table) -> None:
    """Tensor parallelism over two GPUs, if there are two."""
    if torch.cuda.device_count() < 2:
        table.add("two ranks", lambda: {"skipped": f"{torch.cuda.device_count()} GPUs"})
        return
    with checkpoint(LLAMA_1B, 4096) as folder:
        table.add("1B, two ranks", lambda: two_ranks(table, folder))


def two_ranks(table: Table, folder: Path) -> dict[str, Any]:
    with loaded(table, folder, tensor_parallel_size=2) as llm:
        return rates(table, "", llm, (1, 32), 128)


def measure_model(table: Table, name: str, folder: Path, batches: tuple[int, ...], num_tokens: int) -> None:
    positions = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    title = f"{name}, {positions} positions"
    tokens: dict[str, Any] = {}

    def measure(*, eager: bool) -> dict[str, Any]:
        start = time.perf_counter()
        with loaded(table, folder, enforce_eager=eager) as llm:
            figures = {"load_s": time.perf_counter() - start, "kv": str(llm.kv_cache_size)}
            figures |= rates(table, name, llm, batches, num_tokens)
            params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
            outputs = llm.generate([prompt(0, b, 16) for b in range(3)], params)
            tokens["eager" if eager else "graphs"] = [output.outputs[0].token_ids for output in outputs]
        return figures

    table.add(f"{title}, CUDA graphs", lambda: measure(eager=False))
    table.add(f"{title}, without graphs", lambda: measure(eager=True))
    table.add(f"{title}, tokens", lambda: {"are_equal": tokens["eager"] == tokens["graphs"]})


@contextmanager
def loaded(table: Table, folder: Path, **options: Any) -> Iterator[LLM]:
    """An engine with less than half of the memory, which is free again after the block."""
    size: dict[str, Any] = {"num_kv_blocks": 64} if table.is_dry else {"gpu_memory_utilization": 0.45}
    llm = LLM(model=folder, device=table.device.type, dtype="bfloat16", kernels="triton", **size, **options)
    try:
        yield llm
    finally:
        llm.close()
        del llm
        gc.collect()
        if not table.is_dry:
            torch.cuda.empty_cache()


def rates(table: Table, name: str, llm: LLM, batches: tuple[int, ...], num_tokens: int) -> dict[str, Any]:
    """Decoded tokens per second by batch size, of a second run; for one request also the fraction of its ceiling."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    figures: dict[str, Any] = {}
    for batch in batches:
        for run in range(1 if table.is_dry else 2):
            rate = decode_rate(llm, params, batch, run)
        figures[f"tokens/s, batch {batch}"] = rate
        if batch == 1 and name in GOALS:
            num_bytes = 2 * sum(weight.numel() for weight in llm.model.weights.values())
            reached = rate * num_bytes / (table.copy_rate / 2)
            figures |= {"of ceiling": reached, "goal": GOALS[name], "is_met": reached >= GOALS[name]}
    return figures


def prompt(run: int, b: int, length: int) -> list[int]:
    return [(7 * run + 31 * b + 13 * i) % 2000 + 3 for i in range(length)]


def decode_rate(llm: LLM, params: SamplingParams, batch: int, run: int, length: int = 128) -> float:
    """Tokens per second between the first and the last token of each request."""
    length = min(length, llm.model.max_model_len // 4)
    start = time.perf_counter()
    first, count = 0.0, 0
    for output in llm.stream([prompt(run, b, length) for b in range(batch)], [params] * batch):
        first = first or time.perf_counter()
        count += output.finished * len(output.outputs[0].token_ids)
    end = time.perf_counter()
    return (count - batch) / (end - first) if end > first > start else 0.0


def profile(table: Table, name: str, folder: Path, batch: int) -> None:
    """Steps of decodes by kernel: time of kernels, gaps between them, and the time of the host by call."""

    def measure() -> dict[str, Any]:
        with loaded(table, folder, async_scheduling=False) as llm:
            params = SamplingParams(max_tokens=64 if not table.is_dry else 8, temperature=0.0, ignore_eos=True)
            for b in range(batch):
                llm.engine.add(str(b), None, prompt(0, b, 16), params)
            for _ in range(4):
                llm.engine.step()
            return profiled(table, llm, 10 if not table.is_dry else 2)

    table.add(f"{name}, profiled step of {batch}", measure)


def profiled(table: Table, llm: LLM, steps: int) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [] if table.is_dry else [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            llm.engine.step()
        table.synchronize()
        seconds = time.perf_counter() - start
    return step_figures(profiler.events(), steps, seconds)


def step_figures(events: Any, steps: int, seconds: float) -> dict[str, Any]:
    """Microseconds per step; `gaps` is the time of the span from the first to the last kernel without one."""
    kernels, calls = Counter[str](), Counter[str]()
    spans = []
    for event in events:
        span = event.time_range
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name] += span.end - span.start
            spans.append((span.start, span.end))
        elif event.cpu_parent is None:
            calls[event.name] += span.end - span.start
    busy = sum(kernels.values())
    whole = max((end for _, end in spans), default=0) - min((start for start, _ in spans), default=0)
    return {
        "step_us": 1e6 * seconds / steps,
        "kernels_us": busy / steps,
        "gaps_us": max(0.0, whole - busy) / steps,
        "num_kernels": len(spans) / steps,
        "by_kernel_us": {name[:60]: round(us / steps, 1) for name, us in kernels.most_common(12)},
        "by_host_call_us": {name[:60]: round(us / steps, 1) for name, us in calls.most_common(12)},
    }


def transformers_rate(folder: Path, num_tokens: int) -> dict[str, Any]:
    """Greedy decoding of one request by transformers, in the same process, from a second run."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda")
    ids = torch.tensor([prompt(0, 0, 128)], device="cuda")
    for count in (4, num_tokens):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return {"tokens/s": num_tokens / seconds}


@contextmanager
def checkpoint(sizes: dict[str, int], positions: int) -> Iterator[Path]:
    """A folder with a checkpoint of random weights and the tokenizer of the example."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in TOKENIZER.glob("tokenizer*.json"):
            shutil.copy(path, folder)
        config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
        config |= {"tie_word_embeddings": True, "rope_theta": 10000.0, "max_position_embeddings": positions}
        config |= {"hidden_act": "silu", "dtype": "bfloat16", "eos_token_id": 1}
        (folder / "config.json").write_text(json.dumps(config | sizes))
        save_file(random_weights(sizes), folder / "model.safetensors")
        yield folder


def random_weights(sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    H, I, D = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    q, kv = sizes["num_attention_heads"] * D, sizes["num_key_value_heads"] * D
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (sizes["vocab_size"], H), "norm": (H,)}
    for i in range(sizes["num_hidden_layers"]):
        shapes |= {
            f"layers.{i}.self_attn.{name}_proj": shape
            for name, shape in zip("qkvo", ((q, H), (kv, H), (kv, H), (H, q)), strict=True)
        }
        shapes |= {
            f"layers.{i}.mlp.{name}_proj": shape for name, shape in (("gate", (I, H)), ("up", (I, H)), ("down", (H, I)))
        }
        shapes |= {f"layers.{i}.{name}_layernorm": (H,) for name in ("input", "post_attention")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        f"model.{name}.weight": (torch.randn(shape, device=device) * shape[-1] ** -0.5).bfloat16().cpu()
        for name, shape in shapes.items()
    }
