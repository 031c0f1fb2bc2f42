"""The hidden part of transfers: by intervals, by the estimates of a graph, and as measured in an engine."""

import random
from pathlib import Path

import numpy as np
import pytest

from sageLLM import LLM, SamplingParams
from sageLLM.codegen.driver import PACKAGE
from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.execution_graph.io_overlap import measure_overlap, planned_overlap
from sageLLM.runtime.execution_graph.weight_loads import StreamedLayer, stream_weights
from sageLLM.runtime.kernels.cpu.compiler import find_compiler

MODEL = Path(PACKAGE, "examples", "tiny_python_model")
SIZES = {
    "B": 4,
    "S": 4,
    "T": 4,
    "Td": 4,
    "Tp": 0,
    "KV": 64,
    "KVd": 64,
    "LL": 1024,
    "QK": 64,
    "PG": 8,
    "BS": 16,
    "MB": 2,
    "P": 64,
}


def test_the_overlap_is_the_time_that_both_cover() -> None:
    rng = random.Random(0)
    for _ in range(200):
        io, compute = ([sorted(rng.sample(range(60), 2)) for _ in range(rng.randint(0, 6))] for _ in range(2))
        io = [(begin, end) for k, (begin, end) in enumerate(io) if all(end <= b or e <= begin for b, e in io[:k])]
        busy = {t for begin, end in compute for t in range(begin, end)}
        found = measure_overlap(*(np.array(times, dtype=float).reshape(-1, 2) for times in (io, compute)))
        assert found.io_s == sum(end - begin for begin, end in io)
        assert found.hidden_s == sum(t in busy for begin, end in io for t in range(begin, end))


def test_a_slower_tier_is_hidden_less() -> None:
    graph = LLM(MODEL, dtype="float32", num_kv_blocks=8).compiler.kernel_graph("decode")

    def planned(num_bytes: int) -> float:
        layers = {i: StreamedLayer(page=i, num_bytes=num_bytes, buffer=i % 2) for i in range(4)}
        streamed = stream_weights(graph, layers, prefetch_layers=1, budget_bytes=2 * num_bytes)
        return planned_overlap(streamed, HARDWARE["cpu"], SIZES).hidden_fraction

    assert 1 > planned(4096) > planned(2**22) > planned(2**30)


@pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
def test_the_engine_measures_its_io(tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    assert LLM(MODEL, dtype="float32", num_kv_blocks=8).io_stats() == []
    options = {"kv_tier": "host", "kv_tier_space": 0.01, "weights_tier": "disk", "weights_folder": tmp_path}
    llm = LLM(MODEL, dtype="float32", num_kv_blocks=2, max_model_len=128, block_size=16, **options)
    llm.generate([[5] * 40, [7] * 40], params)
    reports = {report.graph: report for report in llm.io_stats()}
    decode = reports["llama_decode_kv_host"]
    assert decode.num_steps >= 6
    assert 0 < decode.last.io_s < decode.total.io_s and 0 <= decode.total.hidden_s <= decode.total.io_s
    assert decode.planned is not None and 0 < decode.planned.hidden_s < decode.planned.io_s
    assert "ms of io per step" in str(decode) and "planned" in str(decode)
