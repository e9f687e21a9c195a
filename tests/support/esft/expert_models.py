"""Tiny random models of every family that the ESFT tests cover."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

EXPERTS, TOP_K, LAYERS, VOCAB = 8, 2, 3, 96
_BASE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": TOP_K,
}
_HEADS = {"head_dim": 8}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_FINE = {"intermediate_size": 48, "moe_intermediate_size": 16}
_GROUPS = {"n_group": 1, "topk_group": 1}
_SHARED = _GROUPS | {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}
FIELDS: dict[str, dict[str, Any]] = {
    "deepseek_v2": _BASE | _LATENT | _FINE | _SHARED | {"topk_method": "greedy"},
    "deepseek_v3": _BASE | _LATENT | _FINE | _SHARED | {"n_group": 2},
    "qwen2_moe": _BASE | _HEADS | _FINE | {"num_experts": EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": _BASE | _HEADS | _FINE | {"num_experts": EXPERTS, "norm_topk_prob": True},
    "mixtral": _BASE | _HEADS | {"num_local_experts": EXPERTS, "intermediate_size": 16},
    "olmoe": _BASE | {"num_experts": EXPERTS, "intermediate_size": 16},
    "gpt_oss": _BASE
    | _HEADS
    | {
        "num_local_experts": EXPERTS,
        "intermediate_size": 16,
        "layer_types": ["full_attention"] * LAYERS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "glm4_moe": _BASE | _HEADS | _FINE | _SHARED,
    "granitemoe": _BASE | {"num_local_experts": EXPERTS, "intermediate_size": 16},
}
FAMILIES = tuple(FIELDS)


def build(family: str, implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a random model whose routers distinguish tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(FIELDS[family] | changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_experts_implementation(implementation)
    for name, weight in model.named_parameters():
        if ".gate.weight" in name or ".router." in name:
            nn.init.normal_(weight, std=0.5)
        elif name.endswith("_bias"):
            nn.init.normal_(weight, std=0.05)
    model.config.use_cache = False
    model.config.output_router_logits = False
    return model.eval()


def batch(rows: int = 4, length: int = 16, low: int = 3, high: int = VOCAB, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return random tokens [rows, length]; the second and third rows are padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, high, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    mask[2, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits [rows, length, vocabulary] in evaluation mode."""
    result: torch.Tensor = model.eval()(**inputs).logits
    return result


def train(model: Any, inputs: dict[str, torch.Tensor], steps: int, rate: float = 1e-2) -> torch.optim.AdamW:
    """Train the weights that have a gradient using AdamW with weight decay 0.1."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.1)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    return optimizer
