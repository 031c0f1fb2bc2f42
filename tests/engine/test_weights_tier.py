"""Weights that stay on disk: the answers are equal, and a model larger than the memory runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.codegen.driver import PACKAGE
from sageLLM.runtime.core.passes.check import verify_schedule
from sageLLM.runtime.errors import CheckpointError, SageError
from sageLLM.runtime.execution_graph.weight_loads import StreamedLayer, stream_weights
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.packing import PackedWeight
from sageLLM.runtime.loader import weight_stream
from sageLLM.runtime.loader.weight_stream import choose_streamed

MODEL = Path(PACKAGE, "examples", "tiny_python_model")
PROMPTS = ["import os\n", "def move(self, x", "class Point:\n    def __init__(self"]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
GIB = 2**30


def load(folder: Path, mode: str = "hybrid", **options: Any) -> LLM:
    config = PDSchedulerConfig(mode=mode, prefill_chunk_size=8)
    return LLM(
        MODEL,
        dtype="float32",
        scheduler=config,
        num_kv_blocks=64,
        weights_folder=folder,
        weights_tier="disk",
        **options,
    )


def answers(llm: LLM) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def plain() -> list[tuple[int, ...]]:
    return answers(LLM(MODEL, dtype="float32", num_kv_blocks=64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.mark.parametrize("mode", ["time_share", "hybrid", "strict"])
def test_the_answers_are_equal(mode: str, folder: Path, plain: list[tuple[int, ...]]) -> None:
    llm = load(folder, mode)
    assert answers(llm) == plain
    stream = llm.compiler.weight_stream
    assert stream is not None and stream.num_streamed == stream.num_layers == 4
    assert {one.stat().st_nlink for one in folder.iterdir()} == {1}, "one file serves all modes"
    assert len(list(folder.iterdir())) == 1


def test_the_references_read_the_declared_form(folder: Path, plain: list[tuple[int, ...]]) -> None:
    assert answers(load(folder, kernels="reference")) == plain


def test_a_larger_budget_keeps_layers_in_memory(folder: Path, plain: list[tuple[int, ...]]) -> None:
    whole = load(folder).compiler.weight_stream
    assert whole is not None
    least = whole.kept_bytes + 2 * whole.staging_bytes
    llm = load(folder, weights_budget=(least + whole.staging_bytes) / GIB)
    stream = llm.compiler.weight_stream
    assert stream is not None and stream.num_streamed == 3
    assert answers(llm) == plain
    everything = load(folder, weights_budget=1)
    assert everything.compiler.weight_stream is not None and everything.compiler.weight_stream.num_streamed == 0
    assert answers(everything) == plain
    with pytest.raises(SageError, match=r"weights_budget must be at least 0\.00\d GiB"):
        load(folder, weights_budget=(least - 1) / GIB)


def test_reads_around_the_page_cache_are_equal(
    folder: Path, plain: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_stream, "_available_memory", lambda: 0)
    llm = load(folder)
    assert answers(llm) == plain
    monkeypatch.setattr(os, "O_DIRECT", -1, raising=False)  # as on a file system that refuses direct reads
    assert answers(load(folder)) == plain
    assert not load(folder).compiler.weight_stream.is_direct


def test_embeddings_are_equal(folder: Path) -> None:
    found = load(folder).embed(PROMPTS, pooling="mean")
    expected = LLM(MODEL, dtype="float32", num_kv_blocks=64).embed(PROMPTS, pooling="mean")
    assert all((a.embedding == b.embedding).all() for a, b in zip(found, expected, strict=True))


def test_a_damaged_file_is_written_again(tmp_path: Path, plain: list[tuple[int, ...]]) -> None:
    load(tmp_path)
    (path,) = tmp_path.iterdir()
    intact = path.read_bytes()
    for damaged in (intact[:5000] + bytes([intact[5000] ^ 1]) + intact[5001:], intact[:-100]):
        path.write_bytes(damaged)
        llm = load(tmp_path)
        assert path.read_bytes() == intact
    assert answers(llm) == plain


def test_a_file_that_shrinks_during_a_run_ends_the_requests(tmp_path: Path) -> None:
    llm = load(tmp_path)
    (path,) = tmp_path.iterdir()
    os.truncate(path, 4096)
    outputs = llm.generate(PROMPTS, GREEDY)
    assert {output.outputs[0].finish_reason for output in outputs} == {"abort"}
    assert "the file ends after 4096 bytes" in str(outputs[0].outputs[0].stop_reason)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="pass a weights_folder with enough room"):
        load(tmp_path / "file" / "folder")


def test_each_rank_reads_its_share(tmp_path: Path, plain: list[tuple[int, ...]]) -> None:
    llm = load(tmp_path, tensor_parallel_size=2)
    try:
        assert answers(llm) == plain
    finally:
        llm.close()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_tied_head_is_stored_once_and_packed(tmp_path: Path) -> None:
    save_llama(tmp_path, 64, 2)
    llm = LLM(
        tmp_path, dtype="float32", num_kv_blocks=8, skip_tokenizer=True, weights_tier="disk", weights_folder=tmp_path
    )
    weights = llm.model.weights
    assert weights["lm_head"] is weights["embed"]
    assert find_compiler() is None or isinstance(weights["embed"], PackedWeight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights_tier": "host"}, "weights_tier must be 'device', 'mapped' or 'disk', got 'host'"),
        ({"weights_budget": 1.0}, "weights_budget requires weights_tier 'disk', got 'device'"),
        ({"weights_tier": "disk", "weights_budget": 0}, "weights_budget must be more than 0 GiB, got 0"),
        ({"weights_tier": "disk", "weights_budget": "1"}, "weights_budget must be a number of GiB, got '1'"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SageError) as caught:
        LLM(MODEL, **options)
    assert message in str(caught.value)


def test_loads_are_issued_a_layer_ahead_and_respect_their_buffers() -> None:
    graph = LLM(MODEL, dtype="float32", num_kv_blocks=8).compiler.kernel_graph("decode")
    layers = {i: StreamedLayer(page=i, num_bytes=4096, buffer=i % 2) for i in range(4)}
    streamed = stream_weights(graph, layers, prefetch_layers=1, budget_bytes=8192)
    verify_schedule(streamed)
    order = list(streamed.nodes)
    for layer in range(4):
        load = streamed.nodes[f"L{layer}.weights"]
        assert load.stream_id == 1
        names = {name for name in streamed.weights if name.startswith(f"layers.{layer}.")}
        readers = [node for node in streamed.nodes.values() if any(ref.name in names for ref in node.inputs)]
        assert readers and all(load.node_id in node.dependencies for node in readers)
        before = [n for n in streamed.nodes.values() if n.layer_id == layer - 1 and n.op != "weight_load"]
        assert all(order.index(load.node_id) < order.index(node.node_id) for node in before)
        if layer >= 2:  # the buffer is free when the last reader of its previous layer has ended
            assert any(streamed.nodes[one].layer_id == layer - 2 for one in load.dependencies)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(None, [0, 1, 2, 3, 4, 5]), (20, [0, 1, 2, 3, 4, 5]), (30, [0, 1, 2, 3, 5]), (59, [1, 3, 5]), (60, [])],
)
def test_streamed_layers_are_few_and_spread_evenly(budget: int | None, expected: list[int]) -> None:
    assert choose_streamed(dict.fromkeys(range(6), 10), [], budget) == expected


LIMITED = """
import resource, sys
from pathlib import Path
from sageLLM import LLM, SamplingParams
model, folder, room = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
options = dict(dtype="float32", num_kv_blocks=16, max_model_len=64, skip_tokenizer=True)
LLM(model, weights_tier="disk", weights_folder=folder, **options).close()  # makes the file, without a limit
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData:")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + room, resource.RLIM_INFINITY))
try:
    LLM(model, **options)
    sys.exit("the resident form was meant to exceed the limit")
except (RuntimeError, MemoryError) as error:
    assert "memory" in str(error), error
llm = LLM(model, weights_tier="disk", weights_folder=folder, **options)
print(*llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))[0].outputs[0].token_ids)
"""


def save_llama(folder: Path, width: int, num_layers: int) -> int:
    """Saves random weights of Llama's layout; returns their bytes."""
    head = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 256, "tie_word_embeddings": True}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": num_layers}
    rest = {"max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **head, **sizes, **rest}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"embed_tokens": (256, width), "norm": (width,)}
    for i in range(num_layers):
        names = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
        names |= {"mlp.gate_proj": (4 * width, width), "mlp.up_proj": (4 * width, width)}
        names |= {
            "mlp.down_proj": (width, 4 * width),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        shapes |= {f"layers.{i}.{name}": shape for name, shape in names.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.{name}.weight": torch.rand(shape, generator=generator) - (0.5 if len(shape) > 1 else 0)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.skipif(sys.platform != "linux", reason="requires RLIMIT_DATA")
@pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
def test_a_model_larger_than_the_memory_runs(tmp_path: Path) -> None:
    num_bytes = save_llama(tmp_path, 256, 24)
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(tmp_path / "packed"), str(num_bytes * 3 // 4)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resident = LLM(tmp_path, dtype="float32", num_kv_blocks=16, max_model_len=64, skip_tokenizer=True)
    output = resident.generate([[5, 6, 7]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))[0]
    assert done.stdout.split() == [str(token) for token in output.outputs[0].token_ids]
