"""Reads op latencies in aiconfigurator's parquet tables (ai-dynamo/aiconfigurator, Apache-2.0), in milliseconds.

pyarrow reads the files; it is the extra "calibration" of the package.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from sageLLM.runtime.sim.calibration.kernel_times import AllReduce, Heads, Measured, experts, gemm
from sageLLM.runtime.sim.trace import TraceError

MIN_WEIGHT_BYTES = 2**26
"""Smaller weights stay in the cache while a benchmark repeats a kernel, but not while an engine runs all layers."""
MAX_TOKENS = 16384
MAX_DECODES = 256

RowValues = Mapping[str, Any]


def read_parquet_tables(folder: Path) -> Measured:
    """The bf16 kernels of the sizes that serving has. Raises TraceError without pyarrow or with other columns."""
    readers: dict[str, Callable[[Measured, RowValues], None]] = {
        "gemm_perf": _add_gemm,
        "context_attention_perf": _add_prompts,
        "generation_attention_perf": _add_decodes,
        "moe_perf": _add_experts,
        "nccl_perf": _add_all_reduce,
    }
    measured = Measured()
    for name, add in readers.items():
        path = folder / f"{name}.parquet"
        if not path.exists():
            continue
        for row in _rows(path):
            try:
                add(measured, row)
            except KeyError as error:
                raise TraceError(f"{path}: expected a column {error}") from None
    return measured


def _rows(path: Path) -> Iterator[RowValues]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise TraceError(f"{path}: pyarrow is required to read parquet; pip install sagellm[calibration]") from None
    try:
        columns = parquet.read_table(path).to_pydict()
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: {error}") from None
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _add_gemm(measured: Measured, row: RowValues) -> None:
    m, n, k = row["m"], row["n"], row["k"]
    if row["gemm_dtype"] == "bfloat16" and m <= MAX_TOKENS and 2 * n * k >= MIN_WEIGHT_BYTES:
        measured.add("gemm", gemm(m, n, k, row["latency"] / 1e3))


def _is_plain_attention(row: RowValues) -> bool:
    """bf16 without a window, as the formulas of the ops count it, by the kernel for 128 elements per head."""
    is_bf16 = row["attn_dtype"] == row["kv_cache_dtype"] == "bfloat16"
    return bool(is_bf16 and row["window_size"] == 0 and row["head_dim"] == 128)


def _heads(row: RowValues) -> Heads:
    return Heads(row["num_heads"], row["num_key_value_heads"], row["head_dim"])


def _add_prompts(measured: Measured, row: RowValues) -> None:
    num_tokens = row["batch_size"] * row["isl"]
    if _is_plain_attention(row) and row["isl"] >= 16 and num_tokens <= MAX_TOKENS:
        found = _heads(row).prompt(0, row["isl"], row["latency"] / 1e3, row["batch_size"])
        measured.add("prefill_attn", found)


def _add_decodes(measured: Measured, row: RowValues) -> None:
    context = row["step"] + 1
    if _is_plain_attention(row) and context >= 64 and row["batch_size"] <= MAX_DECODES:
        measured.add("decode_attn", _heads(row).decodes(row["batch_size"], context, row["latency"] / 1e3))


def _add_experts(measured: Measured, row: RowValues) -> None:
    """A whole mixture in one call, with balanced routing."""
    is_whole = row["moe_tp_size"] == row["moe_ep_size"] == 1
    if row["moe_dtype"] != "bfloat16" or row["distribution"] != "balanced" or not is_whole:
        return
    tokens, per_token = row["num_tokens"], row["topk"]
    if tokens <= MAX_TOKENS:
        num_read = min(row["num_experts"], tokens * per_token)
        seconds = row["latency"] / 1e3
        found = experts(tokens, per_token, num_read, row["hidden_size"], row["inter_size"], seconds)
        measured.add("experts", found)


def _add_all_reduce(measured: Measured, row: RowValues) -> None:
    """`message_size` counts elements."""
    if row["op_name"] == "all_reduce" and row["nccl_dtype"] == "half" and row["message_size"] >= 1024:
        measured.all_reduces.append(AllReduce(2 * row["message_size"], row["num_gpus"], row["latency"] / 1e3))
