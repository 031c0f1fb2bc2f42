"""GEMMs on the CPU: every instruction set against float64; the result of a row depends on nothing but the row."""

import ctypes
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from native import NARROW, FreshLibrary, needs_compiler
from torch import Tensor

from sageLLM.generated.builders.llama import LLAMA
from sageLLM.generated.kernels import cpu, reference
from sageLLM.generated.ops import OPS
from sageLLM.runtime.core.ir.dims import evaluate
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.library import Library, kernel_function
from sageLLM.runtime.kernels.cpu.packing import (
    BLOCK,
    DTYPE_NAMES,
    PackedWeight,
    WeightMemory,
    gates_by_weight,
    pack,
    pack_away,
    unpack_rows,
)
from sageLLM.runtime.registry.plugins import load_registry

pytestmark = needs_compiler
ISAS = [
    (torch.float32, "fp32", ()),
    (torch.float16, "fp32", ()),
    (torch.bfloat16, "fp32", ()),
    (torch.bfloat16, "fp32", NARROW),
    (torch.bfloat16, "avx512_bf16", ()),
    (torch.bfloat16, "amx", ()),
]
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ROWS = (0, 1, 2, 3, 5, 16, 17, 64, 100)
Linear = Callable[..., Tensor]


@pytest.fixture(params=ISAS, ids=[f"{str(dtype)[6:]}-{'narrow' if flags else name}" for dtype, name, flags in ISAS])
def isa(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.dtype, FreshLibrary]:
    dtype, name, flags = request.param
    monkeypatch.setenv("SAGELLM_CPU_ISA", name)
    library = FreshLibrary(tmp_path, flags)
    library.address("linear", DTYPE_NAMES[dtype])
    return dtype, library


def linear(library: Library, x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Calls the kernel on a poisoned result with a margin, which must stay unchanged."""
    (rows, inner), features = x.shape, w.shape[-2]
    framed = torch.full((rows + 1, features + 5), torch.nan, dtype=x.dtype)
    y = framed[:rows, 2 : 2 + features]
    pointers = [x.data_ptr(), w.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()]
    sizes = [rows, inner, features, x.stride(0), inner, framed.stride(0)]
    function = kernel_function(library.address("linear", DTYPE_NAMES[x.dtype]))
    function((ctypes.c_void_p * 4)(*pointers), (ctypes.c_int64 * len(sizes))(*sizes), None)
    assert framed[:, :2].isnan().all() and framed[:, 2 + features :].isnan().all() and framed[rows].isnan().all()
    return y


def assert_near(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """Within one rounding to the stored type of a float32 sum; the error of the sum grows with its terms."""
    exact = torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
    size = x.double().abs() @ w.double().abs().T + (0 if bias is None else bias.double().abs())
    bound = ROUNDING[y.dtype] * exact.abs() + 1e-5 * size + 1e-30
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("inner", "features"), [(1, 1), (31, 17), (33, 80), (100, 65), (320, 144)])
def test_every_isa_is_exact_to_rounding(isa: tuple[torch.dtype, Library], inner: int, features: int) -> None:
    dtype, library = isa
    w, bias = torch.randn(features, inner).to(dtype), torch.randn(features).to(dtype)
    packed = pack(w, 1, library)
    for rows in ROWS:
        x = torch.randn(rows, 2 * inner + 3).to(dtype)[:, 1 : 1 + inner]
        assert_near(linear(library, x, packed), x, w)
        assert_near(linear(library, x, packed, bias), x, w, bias)


def test_a_gate_is_in_the_block_of_its_projection(isa: tuple[torch.dtype, Library]) -> None:
    """Also in blocks for short registers, which have few panels."""
    dtype, library = isa
    gated = NativeCallable(cpu.KERNELS["linear_silu_mul"], library, reference.KERNELS["linear_silu_mul"])
    w = (torch.randn(2 * 37, 70) / 8).to(dtype)
    packed = pack(w, 2, library)
    for rows in (1, 3, 17):
        x = torch.randn(rows, 70).to(dtype)
        gate, value = (x.double() @ w.double().T).split(37, dim=1)
        error = (gated(x, packed).double() - torch.nn.functional.silu(gate) * value).abs()
        assert (error <= max(4 * ROUNDING[dtype], 1e-5) * (1 + value.abs() * gate.abs())).all()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("inner", [96, 700])
def test_a_row_depends_on_nothing_but_the_row(isa: tuple[torch.dtype, Library], two_threads: None, inner: int) -> None:
    """700 inputs are several parts of a block of more than one tile (microkernel_pairs.h)."""
    dtype, library = isa
    x, packed = torch.randn(300, inner).to(dtype), pack(torch.randn(400, inner).to(dtype), 1, library)
    whole = linear(library, x, packed)
    every_tile = [(20, rows) for rows in range(1, 18)]
    for first, rows in [(299, 1), *every_tile, (100, 33), (40, 150)]:
        assert torch.equal(linear(library, x[first : first + rows], packed), whole[first : first + rows])
    torch.set_num_threads(1)
    assert torch.equal(linear(library, x, packed), whole)


def test_infinities_and_nans_stay_in_their_row_and_feature(isa: tuple[torch.dtype, Library]) -> None:
    dtype, library = isa
    x, w = torch.randn(20, 40).to(dtype), torch.randn(33, 40).to(dtype)
    x[3, 5], x[7, 1], w[11, 2] = torch.inf, torch.nan, torch.nan
    y, exact = linear(library, x, pack(w, 1, library)), torch.nn.functional.linear(x.double(), w.double())
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.double()[exact.isinf()], exact[exact.isinf()])
    assert torch.equal(y.isinf(), exact.isinf())


def test_large_values_are_summed_in_float32(isa: tuple[torch.dtype, Library]) -> None:
    """2^14 * 2^14 is more than f16 holds; the sum is not."""
    dtype, library = isa
    x = torch.tensor([[2.0**14, 0.0, 2.0**14, 0.0, 1.0]]).to(dtype)
    w = torch.tensor([[2.0**14, 0.0, -(2.0**14), 0.0, 3.0]]).to(dtype)
    assert linear(library, x, pack(w, 1, library)).item() == 3.0


SAMPLED = [op for op in cpu.KERNELS if op.startswith("lm_head") and op.endswith("_sample")]
GEMMS = [op for op, k in cpu.KERNELS.items() if k.packed and not op.startswith("expert_") and op not in SAMPLED]
SIZES = {"R": 5, "S": 5, "T": 5, "K": 70, "H": 70, "N": 37, "V": 37, "X": 37, "I": 37, "M": 21}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", GEMMS)
def test_gemms_agree_with_their_reference(op: str, dtype: torch.dtype, with_bias: bool, tmp_path: Path) -> None:
    """The same roundings as the reference; its sums have another order, which may change a rounding."""
    kernel = cpu.KERNELS[op]
    operands: list[Tensor | None] = []
    for name, pattern in kernel.op.input_types.items():
        shape = [int(evaluate(dim, SIZES)) for dim in pattern.trailing]
        given = with_bias or name not in kernel.op.optional_inputs
        operands.append(torch.randn((5, *shape) if pattern.has_leading else shape).to(dtype) if given else None)
    attrs = dict.fromkeys(kernel.op.attr_types, 1.25)
    run = NativeCallable(kernel, FreshLibrary(tmp_path), reference.KERNELS[op])
    expected = reference.KERNELS[op](*operands, **attrs)
    rounding = ROUNDING[dtype]
    close = {"rtol": max(4 * rounding, 1e-5), "atol": 40 * rounding + 1e-5}
    torch.testing.assert_close(run(*operands, **attrs), expected, **close)


def in_two_calls(
    op: str, library: Library, operands: list[Tensor], filters: list[Tensor | None], **attrs: float
) -> Any:
    """The logits, and the tokens of `sample` when it reads them."""
    head, sample = (NativeCallable(cpu.KERNELS[name], library, reference.KERNELS[name]) for name in (op[:-7], "sample"))
    logits = head(*operands, **attrs)
    return logits, sample(logits, *filters)


@pytest.mark.parametrize("op", SAMPLED)
def test_sampling_as_an_epilogue_returns_the_same_tokens(
    op: str, isa: tuple[torch.dtype, FreshLibrary], two_threads: None
) -> None:
    """The same bits as the projection and then `sample`. Integer operands produce ties, of which the first wins."""
    dtype, library = isa
    fused, attrs = NativeCallable(cpu.KERNELS[op], library, reference.KERNELS[op]), {}
    if OPS[op].attr_types:
        attrs = dict.fromkeys(OPS[op].attr_types, 1.25)
    for rows, inner, vocab in [(0, 3, 7), (1, 5, 1), (1, 96, 4099), (3, 40, 37), (20, 33, 1000), (150, 64, 1050)]:
        x = torch.randint(-1, 2, (rows, inner)).to(dtype)
        w, bias = torch.randint(-1, 2, (vocab, inner)).to(dtype), torch.randint(-1, 2, (vocab,)).to(dtype)
        packed = pack(w, 1, library)
        drawn = [torch.rand(rows).round(), torch.full((rows,), 9).int(), None, None, torch.rand(rows)]
        for filters in ([None] * 5, drawn):
            expected = in_two_calls(op, library, [x, packed, bias], filters, **attrs)
            for threads in (2, 1):
                torch.set_num_threads(threads)
                assert all(map(torch.equal, fused(x, packed, bias, *filters, **attrs), expected))


def test_the_first_of_the_largest_logits_at_every_position(
    isa: tuple[torch.dtype, FreshLibrary], two_threads: None
) -> None:
    """In every lane and in the parts of both threads; NaN is larger than everything, and -inf may be the largest."""
    dtype, library = isa
    fused = NativeCallable(cpu.KERNELS["lm_head_sample"], library, reference.KERNELS["lm_head_sample"])
    x, packed = torch.ones(1, 1).to(dtype), pack(torch.zeros(3001, 1).to(dtype), 1, library)

    def token(**values: float) -> int:
        bias = torch.full((3001,), values.pop("rest", -1.0)).to(dtype)
        for name, value in values.items():
            bias[int(name[1:])] = value
        (found,) = fused(x, packed, bias)[1].tolist()
        return int(found)

    assert token() == token(rest=-torch.inf) == token(rest=torch.nan) == 0
    assert [token(**{f"t{at}": 2.0}) for at in (0, 5, 17, 1499, 1500, 2999, 3000)] == [0, 5, 17, 1499, 1500, 2999, 3000]
    assert token(t2990=2.0, t19=2.0, t3=1.0) == token(t19=2.0, t35=2.0) == token(t24=2.0, t19=2.0) == 19
    assert token(t40=torch.nan, t2=torch.inf) == token(t40=torch.nan, t2999=torch.nan) == 40
    assert token(rest=-torch.inf, t2000=-3.0e4) == 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("features", "inner"), [(1, 1), (16, 32), (31, 33), (50, 7)])
def test_rows_of_a_packed_table_are_unpacked(dtype: torch.dtype, features: int, inner: int, tmp_path: Path) -> None:
    library = FreshLibrary(tmp_path)
    table = torch.randn(features, inner + 2).to(dtype)[:, 1:-1]
    ids = torch.arange(features, dtype=torch.int32).flip(0)
    assert torch.equal(unpack_rows(pack(table, 1, library), ids, library), table.flip(0))


def test_a_packed_table_is_embedding_and_head_at_once(tmp_path: Path) -> None:
    library, ids = FreshLibrary(tmp_path), torch.tensor([5, 0, 19], dtype=torch.int32)
    table = torch.randn(20, 40).bfloat16()
    embedding = NativeCallable(cpu.KERNELS["embedding"], library, reference.KERNELS["embedding"])
    packed = pack(table, 1, library)
    for form in (table, packed):
        assert torch.equal(embedding(ids, form), table[ids])
    head = NativeCallable(cpu.KERNELS["lm_head"], library, reference.KERNELS["lm_head"])
    assert torch.equal(head(table[ids], packed), head(table[ids], table))


def test_weights_are_packed_if_all_consumers_agree() -> None:
    """Gate and up of a fused feed-forward layer alternate; a tied table is one weight; norm weights are not packed."""
    config = LLAMA.read_config(HFConfig(LLAMA.tiny))
    graph = ModelCompiler(LLAMA, config, load_registry(), dtype="f32", kernels=cpu.KERNELS).kernel_graph("decode")
    nodes = [node for node in graph.nodes.values() if isinstance(node, OpNode)]
    gates = gates_by_weight(nodes, cpu.KERNELS, {"lm_head": "embed"})
    layer = {name.removeprefix("layers.0."): gates[name] for name in gates if not name.startswith("layers.1.")}
    assert layer == {"attention.wqkv": 1, "attention.wo": 1, "ffn.wgu": 2, "ffn.wd": 1, "embed": 1}
    assert "embed" not in gates_by_weight(nodes, cpu.KERNELS, {})


def test_the_layout_of_gates_alternates_panels_within_a_group(tmp_path: Path) -> None:
    library = FreshLibrary(tmp_path)
    weight = torch.randn(3, 2 * 20, 5)
    one = [pack(weight[g, h * 20 : h * 20 + 20], 1, library).values.reshape(2, -1) for g in range(3) for h in range(2)]
    expected = torch.stack([torch.stack(one[g : g + 2], dim=1) for g in (0, 2, 4)])
    assert torch.equal(pack(weight, 2, library).values, expected.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 9, 70])
@pytest.mark.parametrize("op", ["expert_linear", "expert_down"])
def test_experts_agree_with_their_reference(op: str, tokens: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Some experts have many rows, others none."""
    choices, num_experts, features, inner = 3, 11, 20, 33
    kernel = NativeCallable(cpu.KERNELS[op], FreshLibrary(tmp_path), reference.KERNELS[op])
    experts = torch.rand(tokens, num_experts - 2).argsort(dim=1)[:, :choices].int()
    shape = (tokens, inner) if op == "expert_linear" else (tokens, choices, inner)
    x, w = torch.randn(shape).to(dtype), torch.randn(num_experts, features, inner).to(dtype)
    for bias in (None, torch.randn(num_experts, features).to(dtype)):
        exact = reference.KERNELS[op](x.double(), experts, w.double(), None if bias is None else bias.double())
        result = kernel(x, experts, w, bias).double()
        torch.testing.assert_close(result, exact, rtol=ROUNDING[dtype], atol=2e-4)


def test_pieces_of_memory_begin_at_cache_lines_and_do_not_overlap() -> None:
    memory = WeightMemory(reserve=4096)
    pieces = [memory.take(count, torch.bfloat16) for count in (1, 33, 100, 5000, 7)]
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces)
    assert [piece.unique().tolist() for piece in pieces] == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 33), (4001, 100), (70000, 96)])
def test_the_memory_of_a_weight_is_returned_while_it_is_packed(
    dtype: torch.dtype, shape: tuple[int, int], tmp_path: Path
) -> None:
    library = FreshLibrary(tmp_path)
    weight = torch.randn(shape).to(dtype)
    expected = pack(weight, 1, library).values
    found = pack_away(weight, library, WeightMemory())
    assert torch.equal(found.values, expected) and found.shape == weight.shape
    # Pages at the ends may be of others, too, and those at the ends of blocks are of two blocks.
    assert num_resident(weight) <= min(weight.nbytes // mmap.PAGESIZE, weight.nbytes // BLOCK) + 2


def num_resident(tensor: Tensor) -> int:
    """The pages of a tensor that are in memory."""
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    count = -(-(tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * count)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(count * mmap.PAGESIZE), flags) == 0
    return sum(flag & 1 for flag in flags)
