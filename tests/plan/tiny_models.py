"""Tiny models for the tests of plans."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

FIELDS: dict[str, dict[str, Any]] = {
    "llama": SHAPE | IDS,
    "qwen3": SHAPE | IDS | {"tie_word_embeddings": True},
    "mixtral": SHAPE | IDS | MOE | {"num_local_experts": 4},
    "qwen3_moe": SHAPE | IDS | MOE | {"num_experts": 4},
    "qwen2_moe": SHAPE | IDS | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "bert": {key: value for key, value in SHAPE.items() if key not in ("head_dim", "num_key_value_heads")},
    "modernbert": {key: value for key, value in SHAPE.items() if key not in ("head_dim", "num_key_value_heads")}
    | IDS
    | {"cls_token_id": 1, "sep_token_id": 2},
}


def tiny(family: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a tiny model."""
    return AutoConfig.for_model(family, **(FIELDS[family] | changes))
