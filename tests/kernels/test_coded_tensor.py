"""Weights of codes as Triton kernels read them: their values, as torch sees them, and which weights stay codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sageLLM.generated import ops
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.executor.planner import TritonPlanner
from sageLLM.runtime.executor.weight_stats import weight_stats
from sageLLM.runtime.kernels.coded_tensor import PART_BYTES, ROW_BYTES, CodedTensor, coded_tensor
from sageLLM.runtime.kernels.cpu.coded import FORMS, CodedWeight, decoded, words_of

CPU = torch.device("cpu")
SIZES = [(7, 96, 32), (5, 100, 100), (3, 80, 16)]


def weight(
    form: str, shape: tuple[int, ...], group: int, dtype: torch.dtype = torch.float32, scales: str = "f32"
) -> CodedWeight:
    *rows, inner = shape
    counts = (*rows, -(-inner // group))
    codes = torch.randint(0, 2 ** FORMS[form].bits, shape, dtype=torch.uint8)
    if form == "fp8":
        codes = torch.randn(shape).to(torch.float8_e4m3fn).view(torch.uint8)
    made: dict[str, Tensor] = {"scales": torch.rand(counts)}
    if scales == "e8m0":
        made["scales"] = torch.randint(100, 150, counts, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    elif scales == "factors":
        made |= {"scales": torch.randint(-60, 60, counts, dtype=torch.int8), "factors": torch.rand(*rows, 1).half()}
    elif scales == "minima":
        made = {name: torch.randint(0, 60, counts, dtype=torch.int8) for name in ("scales", "zeros")}
        made |= {name: torch.rand(*rows, 1).half() for name in ("factors", "minima")}
    if FORMS[form].values is None and scales != "minima":
        made["zeros"] = torch.randint(-5, 5, counts, dtype=torch.int8)
    return CodedWeight(form, torch.Size(shape), group, words_of(codes, FORMS[form]), dtype=dtype, **made)


@pytest.mark.parametrize("scales", ["f32", "e8m0", "factors", "minima"])
@pytest.mark.parametrize(("rows", "inner", "group"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_the_codes(form: str, rows: int, inner: int, group: int, scales: str) -> None:
    if scales == "minima" and FORMS[form].values is not None:
        pytest.skip("only integers have minima")
    source = weight(form, (2, rows, inner), group, scales=scales)
    found = coded_tensor(source, CPU)
    assert torch.equal(found.decoded(), decoded(source))
    layout = found.code_layout
    starts = [one for one in (layout.minima, layout.zeros, layout.table, layout.codes, layout.high) if one >= 0]
    assert all(start % PART_BYTES == 0 for start in starts) and found.rows.shape[-1] % ROW_BYTES == 0
    assert found.num_bytes == found.rows.numel() and found.shape == source.shape


def test_torch_sees_the_values() -> None:
    source = weight("int4", (6, 64), 32, torch.bfloat16)
    found, x = coded_tensor(source, CPU), torch.randn(3, 64).bfloat16()
    assert isinstance(found, Tensor) and found.dtype == torch.bfloat16 and found.stride() == (64, 1)
    expected = torch.nn.functional.linear(x, decoded(source, torch.bfloat16))
    assert torch.equal(torch.nn.functional.linear(x, found), expected)
    assert found.detach() is found


def test_weights_that_only_gemms_read_stay_codes() -> None:
    """A table that is the head, too, is read by a gather, and becomes floats."""
    g = GraphWriter("two", level="kernel", stage=None, dtype="f32")
    ids, table, w = g.input("ids", "i32", 4), g.weight("table", "f32", 6, 64), g.weight("w", "f32", 64, 64)
    graph = g.finish([ops.lm_head(g, ops.linear(g, ops.embedding(g, ids, table), w), table)])
    source = weight("int4", (64, 64), 32)
    weights = {"table": weight("int8", (6, 64), 64), "head": weight("int8", (6, 64), 64), "w": source}
    planner = TritonPlanner({}, {"linear": "w", "lm_head": "w"}, CPU)
    planner.prepare_weights(weights, {"head": "table"}, [graph])  # type: ignore[arg-type]
    assert isinstance(weights["w"], CodedTensor) and not isinstance(weights["table"], CodedTensor | CodedWeight)
    assert weights["head"] is weights["table"]
    [floats, codes] = weight_stats(weights, {"head": "table"}, planner, {})  # type: ignore[arg-type]
    assert floats.form == "float32"
    assert (codes.form, codes.kernel) == ("int4 in groups of 32", "Triton, decoded in registers")
    assert codes.num_bytes == weights["w"].num_bytes
