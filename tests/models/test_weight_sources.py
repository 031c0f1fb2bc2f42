"""Tests of weights from YAML lines to loaded tensors: every packing against its torch equivalent."""

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sageLLM.codegen import driver
from sageLLM.codegen.diagnostics import Sink, SpecErrors
from sageLLM.codegen.emit.weights import WeightText, tuple_text
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.link.config import link_config
from sageLLM.codegen.link.flatten import flatten
from sageLLM.codegen.link.weights import WeightLinker, link_weights
from sageLLM.codegen.load import load_specs
from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.model.checkpoint import check_checkpoint
from sageLLM.runtime.core.model.weights import (
    MAX_STACKED,
    Part,
    Shard,
    View,
    WeightSpec,
    share_runs,
    share_shape,
    stacked,
)
from sageLLM.runtime.loader.safetensors_reader import Checkpoint
from sageLLM.runtime.loader.weights import load_weights, rank_shard

LAYOUT = """
schema: models/v1
model: packed
summary: A layout with the weights of a test.
extends: llama
hf: {{architectures: [PackedForCausalLM]}}
config: {{{config}}}
tp: {{divides: [Nq, Nkv, I]}}
weights:
{weights}
tests: {{tiny: {{}}}}
"""
SIZES = {"H": 12, "Nq": 4, "Nkv": 2, "D": 6, "I": 8, "V": 10, "X": 3, "G": 2, "C": 5, "Dn": 2, "Dv": 7}
GROUPED = '{rearrange: "(Nkv g D) H -> (Nkv g D) H", of: a.weight, sizes: {g: G + 2}, take: {g: "%s"}}'


def weight_specs(folder: Path, weights: str, sizes: Mapping[str, int] = SIZES) -> dict[str, WeightSpec]:
    """The weights of YAML lines, by name; SpecErrors for findings."""
    config = ", ".join(f"{name}: {{hf: {name}}}" for name in sizes)
    text = LAYOUT.format(config=config, weights=textwrap.indent(textwrap.dedent(weights), "  "))
    folder.joinpath("packed.yaml").write_text(text, encoding="utf-8")
    raw, sink = load_specs([driver.BASE_SPECS, folder]), Sink()
    flat = flatten(raw.models["packed"], raw.models, sink)
    assert flat is not None
    own = {name: located for name, located in flat.weights.items() if located.entry is flat.entry}
    linker = WeightLinker(link_config(flat, set(flat.config), (), sink), ("Nq", "Nkv", "I"), sink)
    found = link_weights(linker, own)
    if sink.diagnostics:
        raise SpecErrors(sink.diagnostics)

    def number(size: Size) -> str:
        assert size.evaluate(sizes).denominator == 1
        return str(size.evaluate(sizes))

    writer = WeightText(number, repr, lambda weight: None)
    names = {"Part": Part, "View": View, "Shard": Shard, "WeightSpec": WeightSpec, "stacked": stacked}
    names |= {"c": SimpleNamespace(**sizes), "i": 0}
    specs = {}
    for name, weight in found.items():
        view = writer.view(weight, "i")
        options = "".join(f", {key}={text}" for key, text in view.options)
        specs[name] = eval(f"WeightSpec({view.label}, {tuple_text(view.shape)}, {view.parts}{options})", dict(names))
    return specs


def random_checkpoint(folder: Path, specs: Mapping[str, WeightSpec]) -> dict[str, Tensor]:
    """A file with the tensors that the weights read, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    shapes = {part.name: part.shape for spec in specs.values() for part in spec.parts}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def load(folder: Path, specs: Mapping[str, WeightSpec]) -> dict[str, Tensor]:
    return load_weights(specs.values(), Checkpoint.open(folder), torch.float32, torch.device("cpu"))


PACKED: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "plain": ("w: {shape: [V, H], hf: a.weight}", lambda t: t["a.weight"]),
    "put side by side on dim 1": (
        "w: {shape: [V, C + H], hf: {concat: {a: C, b: H}, dim: 1}}",
        lambda t: torch.cat([t["a"], t["b"]], 1),
    ),
    "GPT-2: a fused projection, stored transposed": (
        "w: {shape: [3*Nq*D, H], hf: {transpose: a.weight}, tp: {shard: 0, segments: [Nq*D, Nq*D, Nq*D]}}",
        lambda t: t["a.weight"].t(),
    ),
    "transposed halves put together": (
        """w:
             shape: [2*I, H]
             hf: {concat: [{size: I, of: {transpose: a}}, {size: I, of: {transpose: b}}]}
             tp: {shard: 0}
        """,
        lambda t: torch.cat([t["a"].t(), t["b"].t()]),
    ),
    "GPT-NeoX: q, k and v next to each other in every head": (
        'w: {shape: [3*Nq*D, H], hf: {rearrange: "(Nq c D) H -> (c Nq D) H", of: a, sizes: {c: 3}}, tp: {shard: 0}}',
        lambda t: torch.cat([t["a"].view(4, 3, 6, 12)[:, n].reshape(24, 12) for n in range(3)]),
    ),
    "GPT-NeoX: the bias": (
        'w: {shape: [3*Nq*D], hf: {rearrange: "(Nq c D) -> (c Nq D)", of: a, sizes: {c: 3}}, tp: {shard: 0}}',
        lambda t: torch.cat([t["a"].view(4, 3, 6)[:, n].reshape(24) for n in range(3)]),
    ),
    "Falcon: queries, key and value next to each other in every group": (
        f"""w:
              shape: [(Nkv*G + 2*Nkv)*D, H]
              hf:
                concat:
                  - {{size: Nkv*G*D, of: {GROUPED % "0:G"}}}
                  - {{size: Nkv*D, of: {GROUPED % "G:G + 1"}}}
                  - {{size: Nkv*D, of: {GROUPED % "G + 1:G + 2"}}}
              tp: {{shard: 0}}
        """,
        lambda t: torch.cat([t["a.weight"].view(2, 4, 6, 12)[:, part].reshape(-1, 12) for part in ([0, 1], [2], [3])]),
    ),
    "Mixtral: an expert's gate and up, stacked over the experts": (
        """w:
             shape: [X, 2*I, H]
             hf: {stack: {over: e in X, of: {concat: {"x.{e}.w1": I, "x.{e}.w3": I}}}}
             tp: {shard: 1}
        """,
        lambda t: torch.stack([torch.cat([t[f"x.{e}.w1"], t[f"x.{e}.w3"]]) for e in range(3)]),
    ),
    "a stack of transposed experts": (
        'w: {shape: [X, H, I], hf: {stack: {over: e in X, of: {transpose: "x.{e}.w2"}}}, tp: {shard: 2}}',
        lambda t: torch.stack([t[f"x.{e}.w2"].t() for e in range(3)]),
    ),
    "a transposed stack": (
        'w: {shape: [X, I, H], hf: {transpose: {stack: {over: e in X, of: "x.{e}.w2"}}}, tp: {shard: 1}}',
        lambda t: torch.stack([t[f"x.{e}.w2"].t() for e in range(3)]),
    ),
    "a transposed stack of vectors": (
        'w: {shape: [H, X], hf: {transpose: {stack: {over: e in X, of: "x.{e}.b"}}}}',
        lambda t: torch.stack([t[f"x.{e}.b"] for e in range(3)], 1),
    ),
    "one index of an axis": (
        """w:
             shape: [2*H, X]
             hf:
               concat:
                 - {size: H, of: {rearrange: "H c X -> H X", of: a, sizes: {c: 2}, take: {c: 1}}}
                 - {size: H, of: {rearrange: "H c X -> H X", of: a, sizes: {c: 2}, take: {c: "0"}}}
        """,
        lambda t: torch.cat([t["a"][:, 1], t["a"][:, 0]]),
    ),
    "one number, stored as a vector of one": ('w: {shape: [], hf: {rearrange: "1 ->", of: a}}', lambda t: t["a"][0]),
    "a row, stored as a vector": ('w: {shape: [1, H], hf: {rearrange: "H -> 1 H", of: a}}', lambda t: t["a"][None]),
    "numbers of experts, each stored as a matrix of one": (
        'w: {shape: [X], hf: {stack: {over: e in X, of: {rearrange: "1 1 ->", of: "x.{e}"}}}}',
        lambda t: torch.stack([t[f"x.{e}"][0, 0] for e in range(3)]),
    ),
    "Llama 4: all experts in one tensor, inputs first": (
        "w: {shape: [X, 2*I, H], hf: {transpose: a}, tp: {shard: 1, segments: [I, I]}}",
        lambda t: t["a"].transpose(1, 2),
    ),
    "gpt-oss: all experts in one tensor, gate and up in alternating columns": (
        'w: {shape: [X, 2*I, H], hf: {rearrange: "X H (I c) -> X (c I) H", of: a, sizes: {c: 2}}, tp: {shard: 1}}',
        lambda t: torch.cat([t["a"][:, :, 0::2], t["a"][:, :, 1::2]], 2).transpose(1, 2),
    ),
    "Llama: rotary pairs next to each other, expected in halves": (
        """w:
             shape: [Nq*D, H]
             hf: {rearrange: "(Nq j c) H -> (Nq c j) H", of: a, sizes: {j: D/2, c: 2}}
             tp: {shard: 0}
        """,
        lambda t: torch.cat([t["a"].view(4, 6, 12)[:, 0::2], t["a"].view(4, 6, 12)[:, 1::2]], 1).reshape(24, 12),
    ),
}


@pytest.mark.parametrize("case", PACKED)
def test_a_packed_weight_is_loaded_as_torch_would_build_it(case: str, tmp_path: Path) -> None:
    lines, wanted = PACKED[case]
    specs = weight_specs(tmp_path, lines)
    tensors = random_checkpoint(tmp_path, specs)
    assert torch.equal(load(tmp_path, specs)["w"], wanted(tensors))


def test_a_single_number_is_held_by_every_rank(tmp_path: Path) -> None:
    spec = weight_specs(tmp_path, 'w: {shape: [], hf: {rearrange: "1 ->", of: a}}')["w"]
    assert share_shape(spec, 2) == ()
    assert rank_shard(spec, torch.tensor(3.0), 1, 2).item() == 3.0


@pytest.mark.parametrize("case", [case for case, (lines, _) in PACKED.items() if "tp:" in lines])
def test_the_ranks_shares_are_the_whole_weight(case: str, tmp_path: Path) -> None:
    """Each segment is put together again from the ranks' shares of it."""
    spec = weight_specs(tmp_path, PACKED[case][0])["w"]
    assert spec.shard is not None
    dim, segments = spec.shard.dim, spec.shard.segments or (spec.shape[spec.shard.dim],)
    whole = torch.randn(spec.shape)
    shares = [rank_shard(spec, whole, rank, 2).split([size // 2 for size in segments], dim) for rank in range(2)]
    assert torch.equal(torch.cat([share[n] for n in range(len(segments)) for share in shares], dim), whole)
    assert {share.shape[dim] for share in (rank_shard(spec, whole, rank, 2) for rank in range(2))} == {
        spec.shape[dim] // 2
    }


SEGMENTS = {
    "GPT-NeoX: q, k and v next to each other in every head": (24, 24, 24),
    "Falcon: queries, key and value next to each other in every group": (24, 12, 12),
    "Mixtral: an expert's gate and up, stacked over the experts": (8, 8),
    "gpt-oss: all experts in one tensor, gate and up in alternating columns": (8, 8),
    "Llama: rotary pairs next to each other, expected in halves": (),
    "a stack of transposed experts": (),
}


@pytest.mark.parametrize("case", SEGMENTS)
def test_segments_follow_from_the_source(case: str, tmp_path: Path) -> None:
    shard = weight_specs(tmp_path, PACKED[case][0])["w"].shard
    assert shard is not None
    assert shard.segments == SEGMENTS[case]


LATENT = """
k:
  shape: [Nq, Dn, C]
  hf: {rearrange: "(Nq d) C -> Nq d C", of: kv_b, sizes: {d: Dn + Dv}, take: {d: "0:Dn"}}
  tp: {shard: 0}
v:
  shape: [Nq, C, Dv]
  hf: {rearrange: "(Nq d) C -> Nq C d", of: kv_b, sizes: {d: Dn + Dv}, take: {d: "Dn:Dn + Dv"}}
  tp: {shard: 0}
"""


def test_two_weights_share_one_tensor(tmp_path: Path) -> None:
    """DeepSeek's kv_b_proj: of every head, some rows make keys and the others values."""
    specs = weight_specs(tmp_path, LATENT)
    tensors = random_checkpoint(tmp_path, specs)
    by_head = tensors["kv_b"].view(4, 9, 5)
    weights = load(tmp_path, specs)
    assert torch.equal(weights["k"], by_head[:, :2])
    assert torch.equal(weights["v"], by_head[:, 2:].transpose(1, 2))
    assert problems(specs, {name: tuple(tensor.shape) for name, tensor in tensors.items()}) == []


def problems(specs: Mapping[str, WeightSpec], shapes: Mapping[str, tuple[int, ...] | None]) -> list[str]:
    layout = SimpleNamespace(ignore=(), weights=lambda config: specs.values())
    return check_checkpoint(layout, None, shapes)


def part(start: int, stop: int, axes: tuple[int, ...] = (6, 4)) -> tuple[Part, ...]:
    return (Part("t", (6, 4), view=View(axes, (0, 1), (stop - start, 4), take=((0, start, stop),))),)


COVERS = [
    ([part(0, 2), part(2, 6)], []),
    ([part(0, 2), part(1, 6)], ["tensor 't' is read by both w0 and w1; tie one to the other"]),
    ([part(0, 2), part(3, 6)], ["tensor 't': 4 elements are unused by the layout"]),
    ([part(0, 2), part(2, 8, (12, 2))], ["tensor 't' is reshaped to [6, 4] for w0, but to [12, 2] for w1"]),
    ([part(0, 2), (Part("t", (6, 4)),)], ["tensor 't' is read by both w1 and w0; tie one to the other"]),
    ([(Part("t", (6, 4)),)] * 2, ["tensor 't' is read by both w0 and w1; tie one to the other"]),
    ([(*part(0, 3), *part(0, 3))], ["tensor 't' is read twice by w0"]),
    ([part(0, 5, (5, 4))], ["tensor 't' [6, 4] cannot be reshaped to [5, 4] for w0"]),
]


@pytest.mark.parametrize(("parts", "wanted"), COVERS)
def test_every_element_is_read_once(parts: list[tuple[Part, ...]], wanted: list[str]) -> None:
    specs = {f"w{n}": WeightSpec(f"w{n}", (6, 4), each) for n, each in enumerate(parts)}
    assert problems(specs, {"t": (6, 4)}) == wanted


def test_names_are_compared_where_shapes_are_not_known() -> None:
    specs = {"w": WeightSpec("w", (6, 4), (Part("t", (6, 4)), Part("u", (6, 4))))}
    assert problems(specs, {"t": None, "x": None}) == [
        "missing tensor 'u' [6, 4], which fills w",
        "tensor 'x' is unused by the layout",
    ]


def test_a_bias_of_a_sum_is_whole_on_the_first_rank() -> None:
    spec = WeightSpec("b", (4,), (Part("b", (4,)),), shard=Shard(0, kind="first"))
    whole = torch.randn(4)
    assert torch.equal(rank_shard(spec, whole, 0, 2), whole)
    assert not rank_shard(spec, whole, 1, 2).any()
    assert share_runs(spec, 1, 2) == ((0, 4),)


def test_a_share_that_does_not_come_out_even_is_refused() -> None:
    spec = WeightSpec("w", (9, 4), (Part("w", (9, 4)),), shard=Shard(0, segments=(6, 3)))
    with pytest.raises(ConfigError) as caught:
        rank_shard(spec, torch.zeros(9, 4), 0, 2)
    assert str(caught.value) == "tensor_parallel_size=2 does not divide 3 rows of w"


def test_a_config_cannot_ask_for_a_stack_without_end() -> None:
    with pytest.raises(ConfigError) as caught:
        stacked("num_experts", MAX_STACKED + 1)
    assert str(caught.value) == "num_experts: expected at most 65536 stacked tensors, got 65537"
