"""Families with a mixture of experts against transformers: greedy tokens and prompt log-probabilities."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .test_oracle import check_all_modes

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
LATENT = {
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
SIGMOID = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
SHARED = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_shared_experts": 1,
    "moe_intermediate_size": 40,
    "head_dim": 16,
}
ATTENTION_ONLY = {"layer_types": ["full_attention"] * 3, "shared_intermediate_size": 72, "mamba_n_heads": 4}
LLAMA4 = {"num_local_experts": 4, "intermediate_size_mlp": 72, "head_dim": 16, "floor_scale": 5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "mixtral, window, three experts a token": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 7, "head_dim": 24},
    ),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "num_experts": 6, "head_dim": 32, "norm_topk_prob": True}),
    "qwen3_moe without renormalisation, one dense layer": (
        "Qwen3Moe",
        {**EXPERTS, "num_experts": 6, "head_dim": 16, "mlp_only_layers": [1], "attention_bias": True},
    ),
    "qwen3_moe, every second layer sparse, window": (
        "Qwen3Moe",
        {**EXPERTS, "num_experts": 5, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 6},
    ),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 72}),
    "qwen2_moe with windows, one dense layer": (
        "Qwen2Moe",
        {
            **EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 16, "sliding_window": 8}),
    "gpt_oss, clamped, no biases in the attention": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "sliding_window": 5,
            "swiglu_limit": 0.5,
            "swiglu_alpha": 1.2,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v3": ("DeepseekV3", LATENT),
    "deepseek_v3 with yarn, biases, two shared experts": (
        "DeepseekV3",
        {
            **LATENT,
            "attention_bias": True,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "deepseek_v3 without compressed queries": ("DeepseekV3", {**LATENT, "q_lora_rank": None}),
    "deepseek_v2": ("DeepseekV2", {**LATENT, "q_lora_rank": None, "n_group": None, "topk_group": None}),
    "granitemoe": (
        "GraniteMoe",
        {
            "num_local_experts": 5,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.05,
            "logits_scaling": 16.0,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "olmoe with clipped projections, renormalised": (
        "Olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.7, "norm_topk_prob": True},
    ),
    "minimax_m2": ("MiniMaxM2", {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16, "rotary_dim": 8}),
    "glm4_moe": ("Glm4Moe", {**SIGMOID, "head_dim": 16, "use_qk_norm": True}),
    "glm4_moe with groups and biases, without norms of heads": (
        "Glm4Moe",
        {**SIGMOID, "n_group": 4, "topk_group": 2, "attention_bias": True, "n_shared_experts": 2},
    ),
    "dots1": ("Dots1", {**SIGMOID, "sliding_window": 7, "max_window_layers": 2}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 40, "moe_layer_interval": 2},
    ),
    "ernie4_5_moe without shared experts, untied": (
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 4,
            "moe_k": 3,
            "moe_intermediate_size": 40,
            "moe_num_shared_experts": 0,
            "moe_layer_end_index": 1,
            "tie_word_embeddings": False,
        },
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"num_experts": 5, "moe_topk": 2, "head_dim": 16}),
    "hunyuan_v1_moe with a list of numbers of experts": (
        "HunYuanMoEV1",
        {"num_experts": 4, "moe_topk": [3, 3, 3], "head_dim": 16, "attention_bias": True},
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        {**LATENT, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["sparse", "dense", "sparse"]},
    ),
    "solar_open": ("SolarOpen", {**SIGMOID, "head_dim": 16, "attention_bias": True}),
    "exaone_moe": (
        "ExaoneMoe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_shared_experts": 2,
            "moe_intermediate_size": 40,
            "head_dim": 16,
            "sliding_window": 7,
            "sliding_window_pattern": 2,
        },
    ),
    "hy_v3": ("HYV3", {**SHARED, "router_scaling_factor": 2.5}),
    "hy_v3 with biases, two shared experts, named layers": (
        "HYV3",
        {
            **SHARED,
            "num_shared_experts": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
        },
    ),
    "afmoe": ("Afmoe", {**SHARED, "sliding_window": 7, "global_attn_every_n_layers": 3, "mup_enabled": True}),
    "afmoe with biases, named layers, two shared experts": (
        "Afmoe",
        {
            **SHARED,
            "num_shared_experts": 2,
            "num_dense_layers": 2,
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "attention_bias": True,
            "route_scale": 2.5,
        },
    ),
    "granitemoehybrid": ("GraniteMoeHybrid", {**ATTENTION_ONLY, "num_local_experts": 5, "residual_multiplier": 0.22}),
    "granitemoehybrid without experts, rotated, tied": (
        "GraniteMoeHybrid",
        {
            **ATTENTION_ONLY,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "position_embedding_type": "rope",
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.05,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "flex_olmo": ("FlexOlmo", {"num_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "flex_olmo with groups and biases, renormalised": (
        "FlexOlmo",
        {"num_experts": 4, "num_experts_per_tok": 3, "attention_bias": True, "norm_topk_prob": True},
    ),
    "mellum": ("Mellum", {**EXPERTS, "num_experts": 6, "head_dim": 16}),
    "mellum with windows, scaled positions, a dense layer": (
        "Mellum",
        {
            **EXPERTS,
            "num_experts": 5,
            "head_dim": 32,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "norm_topk_prob": False,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 20000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phimoe": ("Phimoe", {"num_local_experts": 5, "router_jitter_noise": 0.3}),
    "phimoe with biases, a window, factors on the rotation": (
        "Phimoe",
        {
            "num_local_experts": 4,
            "attention_bias": True,
            "lm_head_bias": True,
            "sliding_window": 40,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [2.0] * 8,
                "short_mscale": 1.2,
                "long_mscale": 1.3,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "llama4": (
        "Llama4Text",
        {
            **LLAMA4,
            "num_experts_per_tok": 2,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 13,
            "interleave_moe_layer_step": 2,
        },
    ),
    "llama4 without norms of heads, named layers": (
        "Llama4Text",
        {
            **LLAMA4,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "attention_bias": True,
            "no_rope_layers": [0, 1, 1],
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "attention_chunk_size": 30,
            "moe_layers": [0, 2],
        },
    ),
    "deepseek_v2 with groups": (
        "DeepseekV2",
        {**LATENT, "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0, "n_shared_experts": 1},
    ),
}

MakeCheckpoint = Callable[..., Path]


@pytest.mark.parametrize("case", CASES)
def test_engine_equals_transformers_in_every_mode(case: str, make_checkpoint: MakeCheckpoint) -> None:
    family, config = CASES[case]
    check_all_modes(make_checkpoint(family, **config))
