"""Tests of `sagellm lint model`: counts, degrees and the comparison with an index, from the config alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sageLLM.generated.builders import MODELS
from sageLLM.runtime.cli.lint import LintRequest, lint_checkpoint
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.weights import share_shape
from sageLLM.runtime.execution_graph.builder import ParallelConfig, build_block_graph
from sageLLM.runtime.execution_graph.expand import expand

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}


@pytest.fixture
def lint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """lint("model", config, index=[names], tp="1,2") -> exit code, stdout, stderr."""

    def run(
        what: str,
        config: dict[str, Any] | None = None,
        *,
        index: list[str] | None = None,
        tp: str | None = None,
        as_json: bool = False,
    ) -> tuple[int, str, str]:
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        if index is not None:
            weight_map = dict.fromkeys(index, "model-00001-of-00001.safetensors")
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        code = lint_checkpoint(LintRequest(what, tmp_path if config else None, None, tp, (), as_json))
        out, err = capsys.readouterr()
        return code, out.replace(str(tmp_path), "FOLDER"), err.replace(str(tmp_path), "FOLDER")

    return run


QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_qwen3_30b_a3b_has_18_867_tensors(lint: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = lint("model", QWEN3_30B_A3B, tp="4", as_json=True)
    data = json.loads(out)
    assert (code, data["tensors"], data["parameters"]) == (0, 18_867, 30_532_122_624)


def test_deepseek_v3_has_671_billion_parameters(lint: Callable[..., tuple[int, str, str]]) -> None:
    """Without the layer that predicts a second token. A token keeps 576 numbers a layer, whatever the heads."""
    code, out, _ = lint("model", DEEPSEEK_V3, as_json=True)
    data = json.loads(out)
    assert (code, data["parameters"]) == (0, 671_026_419_200)
    assert data["kv_bytes_per_token"]["bf16"] == 61 * 576 * 2


def test_llama_3_1_8b(lint: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = lint("model", LLAMA_3_1_8B, tp="1,2,16,3")
    assert code == 100
    assert out == (
        "FOLDER/config.json: llama (specs/models/llama.yaml: llama)\n"
        "  tensors       291\n"
        "  parameters    8,030,261,248\n"
        "  bytes         f32 32,121,044,992  bf16 16,060,522,496  f16 16,060,522,496\n"
        "  KV per token  f32 262,144  bf16 131,072  f16 131,072\n"
        "  tp 1          divides; 8,030,261,248 parameters per rank\n"
        "  tp 2          divides; 4,015,263,744 parameters per rank\n"
        "  tp 16         divides; 518,918,144 parameters per rank\n"
        "  tp 3          no: tensor_parallel_size=3 does not divide num_attention_heads=32; use a divisor of 32\n"
    )


def test_a_vocabulary_is_padded(lint: Callable[..., tuple[int, str, str]]) -> None:
    """Granite 3.1 has 49,159 tokens, an odd number."""
    config = {**MODELS["granite"].tiny, "architectures": ["GraniteForCausalLM"]}
    code, out, _ = lint("model", config | {"vocab_size": 49159}, tp="1,2")
    assert code == 0
    assert out.splitlines()[-2].startswith("  tp 1          divides; ")
    assert out.splitlines()[-1].startswith("  tp 2          divides, the vocabulary padded to 49,216; ")
    reports = [json.loads(lint("model", config | {"vocab_size": n}, tp="2", as_json=True)[1]) for n in (49159, 49216)]
    odd, even = (report["degrees"][0] for report in reports)
    assert (odd.pop("padded_vocab"), even.pop("padded_vocab")) == (49216, None)
    assert odd == even


def test_tied_weights_count_once(lint: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = lint("model", {**LLAMA_3_1_8B, "tie_word_embeddings": True}, as_json=True)
    data = json.loads(out)
    assert (code, data["tensors"], data["parameters"]) == (0, 290, 8_030_261_248 - 128256 * 4096)
    assert data["bytes"]["bf16"] == 2 * data["parameters"]
    assert [degree["tp"] for degree in data["degrees"]] == [1, 2, 4, 8]


def test_an_index_is_compared_by_names(lint: Callable[..., tuple[int, str, str]]) -> None:
    config = {**MODELS["llama"].tiny, "num_hidden_layers": 1}
    read = MODELS["llama"].read_config(HFConfig(config))
    names = [part.name for weight in MODELS["llama"].weights(read) for part in weight.parts]
    code, out, _ = lint("model", config, index=[*names, "model.layers.0.self_attn.rotary_emb.inv_freq"])
    assert code == 0
    assert out.splitlines()[-1] == "  index         13 tensors, exactly those of the layout"
    code, out, _ = lint("model", config, index=[*names[1:], "model.layers.0.self_attn.q_norm.weight"])
    assert code == 100
    assert out.splitlines()[-3:] == [
        "  index         12 tensors, which differ from the layout:",
        "    missing tensor 'model.embed_tokens.weight' [128, 64], which fills embed",
        "    tensor 'model.layers.0.self_attn.q_norm.weight' is unused by the layout",
    ]


def test_names_of_the_bare_model_lack_the_prefix(lint: Callable[..., tuple[int, str, str]]) -> None:
    config = {**MODELS["gpt2"].tiny, "architectures": ["GPT2LMHeadModel"]}
    weights = MODELS["gpt2"].weights(MODELS["gpt2"].read_config(HFConfig(config)))
    names = [part.name.removeprefix("transformer.") for w in weights if w.tied_to is None for part in w.parts]
    code, out, _ = lint("model", config, index=[*names, "h.0.attn.bias"])
    assert (code, out.splitlines()[-1]) == (0, "  index         29 tensors, exactly those of the layout")


REFUSED = [
    ("nope", None, None, "error: unknown layout 'nope'; use `model`, or one of "),
    ("model", None, None, "error: the config.json is missing; use `sagellm lint model --config FILE`\n"),
    (
        "model",
        {**LLAMA_3_1_8B, "architectures": ["T5"]},
        None,
        "error: FOLDER/config.json: expected an architecture with a layout, got T5; known",
    ),
    ("model", LLAMA_3_1_8B, "2,x", "error: --tp: expected degrees by commas, such as 1,2,4, got '2,x'\n"),
    ("model", LLAMA_3_1_8B, "0", "error: --tp: degrees must be at least 1, got '0'\n"),
    (
        "llama",
        {**LLAMA_3_1_8B, "num_hidden_layers": 2**31 - 1},
        None,
        "error: FOLDER/config.json: expected at most 2048 layers, got 2147483647\n",
    ),
]


@pytest.mark.parametrize(("what", "config", "tp", "message"), REFUSED)
def test_invalid_arguments(
    what: str, config: dict[str, Any] | None, tp: str | None, message: str, lint: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = lint(what, config, tp=tp)
    assert (code, out, err[: len(message)]) == (1, "", message)


def test_lint_model_needs_no_torch() -> None:
    program = "import sys; import sageLLM.runtime.cli.lint; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=False, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0


@pytest.mark.parametrize("name", MODELS)
def test_shares_of_every_layout_match_the_graphs_of_ranks(name: str) -> None:
    layout = MODELS[name]
    config = layout.read_config(HFConfig(layout.tiny))
    graph = build_block_graph(layout, config, "prefill", ParallelConfig(tensor_parallel_size=2))
    graph = expand(graph, layout, graph.model_config)
    shares = {weight.name: share_shape(weight, 2) for weight in layout.weights(config)}
    assert {weight: ref.shape for weight, ref in graph.weights.items()} == {
        name: shares[name] for name in graph.weights
    }
