"""Dense families since 2024 against transformers: greedy tokens and prompt log-probabilities."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .test_oracle import check_all_modes

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo3": ("Olmo3", {"sliding_window": 7, "num_hidden_layers": 4}),
    "olmo3 with scaled positions, without grouping": (
        "Olmo3",
        {
            "sliding_window": 9,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "starcoder2": ("Starcoder2", {}),
    "starcoder2 with a window, untied, without biases": (
        "Starcoder2",
        {"sliding_window": 7, "tie_word_embeddings": False, "use_bias": False},
    ),
    "arcee": ("Arcee", {}),
    "arcee with biases, own head_dim": ("Arcee", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "seed_oss": ("SeedOss", {"head_dim": 24}),
    "seed_oss with every bias": ("SeedOss", {"head_dim": 32, "attention_out_bias": True, "mlp_bias": True}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 24}),
    "ernie4_5 with biases, untied": ("Ernie4_5", {"head_dim": 16, "use_bias": True, "tie_word_embeddings": False}),
    "glm": ("Glm", {"head_dim": 16}),
    "exaone4": ("Exaone4", {"head_dim": 24, "sliding_window": 7, "sliding_window_pattern": 3}),
    "exaone4 without windows, tied": (
        "Exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True},
    ),
    "ministral with windows in named layers": (
        "Ministral",
        {
            "head_dim": 16,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "ministral3": ("Ministral3", {"head_dim": 24}),
    "ministral3 with queries that grow, a window": (
        "Ministral3",
        {
            "head_dim": 16,
            "sliding_window": 40,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "apertus": ("Apertus", {}),
    "apertus with biases, tied": (
        "Apertus",
        {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "cwm": ("Cwm", {"head_dim": 16, "sliding_window": 7, "bos_token_id": 0}),
    "vaultgemma": (
        "VaultGemma",
        {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 9, "layer_types": None},
    ),
    "hyperclovax": ("HyperCLOVAX", {"logits_scaling": 0.5, "residual_multiplier": 0.3, "embedding_multiplier": 2.0}),
    "hyperclovax without norms after the blocks": (
        "HyperCLOVAX",
        {"use_post_norm": False, "attention_multiplier": 0.2},
    ),
    "youtu": (
        "Youtu",
        {
            "q_lora_rank": 24,
            "kv_lora_rank": 20,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "num_key_value_heads": 4,
        },
    ),
    "mpt": ("Mpt", {}),
    "mpt, heads not a power of two, clipped, scaled": (
        "Mpt",
        {
            "n_heads": 6,
            "d_model": 48,
            "tie_word_embeddings": False,
            "attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.3},
        },
    ),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"head_dim": 24}),
    "hunyuan_v1_dense with a larger base, biases, tied": (
        "HunYuanDenseV1",
        {
            "head_dim": 16,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0},
        },
    ),
    "glm without biases, tied": ("Glm", {"head_dim": 32, "attention_bias": False, "tie_word_embeddings": True}),
}

MakeCheckpoint = Callable[..., Path]


@pytest.mark.parametrize("case", CASES)
def test_engine_equals_transformers_in_every_mode(case: str, make_checkpoint: MakeCheckpoint) -> None:
    family, config = CASES[case]
    check_all_modes(make_checkpoint(family, **config))
