"""Reads kernel times from the csv tables of LLMServingSim's profiler (microseconds) and of Vidur (milliseconds)."""

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from sageLLM.runtime.sim.calibration.kernel_times import AllReduce, Heads, Measured, Row, experts, gemm, memory_bound
from sageLLM.runtime.sim.profile_tables import read_numbers, table_path
from sageLLM.runtime.sim.trace import TraceError


class LayerSizes(NamedTuple):
    """Sizes of a layer on one device: width, heads, width inside the feed-forward, vocabulary, and those of experts."""

    hidden: int
    heads: Heads
    inner: int
    vocab: int
    expert_inner: int = 0
    experts_per_token: int = 0

    def kernels(self) -> dict[str, Callable[[float, float], tuple[str, Row]]]:
        """Family and row of each layer of a profile, by tokens or sequences and seconds."""
        h, (q, kv, d), i, v = self[:4]

        def product(n: int, k: int) -> Callable[[float, float], tuple[str, Row]]:
            return lambda m, seconds: ("gemm", gemm(m, n, k, seconds))

        def traffic(family: str, per_token: int) -> Callable[[float, float], tuple[str, Row]]:
            return lambda m, seconds: (family, memory_bound(m * per_token, seconds))

        return {
            "qkv_proj": product((q + 2 * kv) * d, h),
            "o_proj": product(h, q * d),
            "gate_up_proj": product(2 * i, h),
            "down_proj": product(h, i),
            "lm_head": product(v, h),
            "layernorm": traffic("default", 8 * h),  # with the residual: two reads and two writes
            "final_layernorm": traffic("default", 8 * h),
            "embedding": traffic("default", 4 * h),
            "rotary_emb": traffic("default", 4 * (q + kv) * d),
            "qk_norm": traffic("default", 4 * (q + kv) * d),
            "act_fn": traffic("default", 6 * i),
            "sampler": traffic("sample", 4 * v),
        }


def read_profile_tables(folder: Path, sizes: LayerSizes) -> Measured:
    """The kernels of a profile of LLMServingSim, for a layer of these sizes."""
    measured = Measured()
    kernels = sizes.kernels()
    for name, axis in (("dense", "tokens"), ("per_sequence", "sequences")):
        path = table_path(folder, name)
        for line, row in _named_rows(path):
            try:
                if row["layer"] in kernels:
                    measured.add(*kernels[row["layer"]](float(row[axis]), float(row["time_us"]) / 1e6))
            except (KeyError, ValueError, TypeError) as error:
                raise TraceError(f"{path}:{line}: {error}") from None
    for chunk, start, num, context, time_us in read_numbers(table_path(folder, "attention")):
        seconds = time_us / 1e6
        if not num:
            measured.add("prefill_attn", sizes.heads.prompt(start, chunk, seconds))
        elif not chunk:
            measured.add("decode_attn", sizes.heads.decodes(num, context, seconds))
        elif num >= 4 and 128 <= context <= 4096 and start <= 4096 and chunk >= 32:
            measured.add("mixed_attn", sizes.heads.mixed(start, chunk, num, context, seconds))
    moe = table_path(folder, "moe")
    for tokens, num_read, time_us in read_numbers(moe) if moe.exists() else ():
        a, inner = sizes.experts_per_token, sizes.expert_inner
        measured.add("experts", experts(tokens, a, num_read, sizes.hidden, inner, time_us / 1e6))
    return measured


def read_vidur_table(path: Path) -> Measured:
    """The kernels of Vidur's `mlp.csv` (microsoft/vidur, MIT), which has the sizes of the model in every row."""
    measured = Measured()
    for line, row in _named_rows(path):
        try:
            _add_vidur_row(measured, row)
        except (KeyError, ValueError, TypeError) as error:
            raise TraceError(f"{path}:{line}: {error}") from None
    return measured


def _add_vidur_row(measured: Measured, row: Mapping[str, str]) -> None:
    degree, tokens = int(row["num_tensor_parallel_workers"]), float(row["num_tokens"])
    q, hidden = int(row["n_head"]), int(row["n_embd"])
    heads = Heads(q // degree, max(1, int(row["n_kv_head"]) // degree), hidden // q)
    kernels = LayerSizes(hidden, heads, int(row["n_expanded_embd"]) // degree, int(row["vocab_size"])).kernels()
    names = {
        "attn_pre_proj": "qkv_proj",
        "attn_post_proj": "o_proj",
        "mlp_up_proj": "gate_up_proj",
        "mlp_down_proj": "down_proj",
        "mlp_act": "act_fn",
        "attn_rope": "rotary_emb",
    }
    for name, layer in names.items():
        seconds = float(row[f"time_stats.{name}.median"]) / 1e3
        if seconds > 0:
            measured.add(*kernels[layer](tokens, seconds))
    for name, per_token in (("input_layernorm", 4 * hidden), ("add", 6 * hidden)):
        seconds = float(row[f"time_stats.{name}.median"]) / 1e3
        if seconds > 0:
            measured.add("default", memory_bound(tokens * per_token, seconds))


def read_vidur_all_reduces(path: Path) -> Measured:
    """The all-reduces of Vidur's `all_reduce.csv` within one machine; `size` is in bytes."""
    measured = Measured()
    for line, row in _named_rows(path):
        try:
            num, size = int(row["num_workers"]), float(row["size"])
            seconds = float(row["time_stats.all_reduce.median"]) / 1e3
            if num <= int(row["devices_per_node"]) and size >= 2048:
                measured.all_reduces.append(AllReduce(size, num, seconds))
        except (KeyError, ValueError, TypeError) as error:
            raise TraceError(f"{path}:{line}: {error}") from None
    return measured


def _named_rows(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    with path.open(newline="", encoding="utf-8") as file:
        yield from enumerate(csv.DictReader(file), start=2)
