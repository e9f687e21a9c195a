"""Tiny models for the tests of plans."""

from __future__ import annotations

from typing import Any

from support.model import saved_models
from transformers import AutoConfig, PretrainedConfig

SHAPE: dict[str, Any] = saved_models.SHAPE | {"vocab_size": 128}
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
    """Return the configuration of a tiny model."""
    return AutoConfig.for_model(family, **(FIELDS[family] | changes))
