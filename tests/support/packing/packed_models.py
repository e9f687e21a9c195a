"""Tiny random models of the families in docs/packing.md, and losses of their documents."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from finetune_trainer.data import PackedCollator
from finetune_trainer.model.document_masks import Form, documents_separated

VOCAB = 128
Fields = dict[str, Any]

_IDS: Fields = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = _IDS | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
_PLAIN = {name: value for name, value in _BASE.items() if name not in ("num_key_value_heads", "head_dim")}
_WINDOW = _BASE | {"sliding_window": 8}
_GPT2 = _IDS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
_MAMBA = {"mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
_LATENT = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}

FIELDS: dict[str, Fields] = {
    # The 27 families of the first report.
    "qwen3": _BASE,
    "llama": _BASE,
    "mistral": _WINDOW,
    "gemma2": _WINDOW,
    "gemma3_text": _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _BASE,
    "gpt_oss": _WINDOW | _LOCAL_MOE,
    "gpt2": _GPT2,
    "gpt_neox": _PLAIN,
    "opt": _PLAIN | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": _IDS | {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": _IDS | {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "falcon with ALiBi": _PLAIN | {"alibi": True},
    "gpt_bigcode": _GPT2,
    "gptj": _GPT2 | {"rotary_dim": 8},
    "gpt_neo": _IDS
    | {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
    | {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "mamba": _IDS | {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": _IDS
    | {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
    | {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "lfm2": _BASE | {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": _BASE | _MOE | _DELTA | {"shared_expert_intermediate_size": 32},
    "qwen3_5_text": _BASE | _DELTA,
    "falcon_h1": _BASE | _MAMBA | {"mamba_d_ssm": 64, "mamba_n_heads": 4},
    "bamba": _BASE | _MAMBA | {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "granitemoehybrid": _BASE
    | _LOCAL_MOE
    | _MAMBA
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64, "mamba_n_heads": 8},
    "jamba": _BASE
    | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "recurrent_gemma": _BASE
    | {"lru_width": 64, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    "rwkv": _IDS | {"hidden_size": 64, "num_hidden_layers": 2, "context_length": 64},
    # Families with other structures: sinks, chunks, layers without positions, latent attention, parallel blocks.
    "afmoe": _WINDOW | _MOE | {"layer_types": ["sliding_attention", "full_attention"], "num_dense_layers": 1},
    "biogpt": _PLAIN,
    "codegen": _GPT2 | {"rotary_dim": 8},
    "cohere2": _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": _BASE | _LATENT,
    "doge": _BASE,
    "exaone4": _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "falcon": _PLAIN,
    "glm4": _BASE,
    "granite": _BASE,
    "granitemoehybrid without Mamba": _BASE
    | _LOCAL_MOE
    | _MAMBA
    | {"layer_types": ["attention", "attention"], "shared_intermediate_size": 64, "mamba_n_heads": 8},
    "llama4_text": _BASE
    | {"attention_chunk_size": 8, "no_rope_layers": [1, 0], "num_local_experts": 2, "intermediate_size_mlp": 64},
    "minimax": _BASE | _LOCAL_MOE | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "mixtral": _BASE | _LOCAL_MOE,
    "nemotron_h": _BASE
    | {"layers_block_type": ["linear_attention", "full_attention"], "ssm_state_size": 8, "n_groups": 1}
    | {"mamba_num_heads": 8, "mamba_head_dim": 16, "chunk_size": 16},
    "olmo2": _BASE,
    "phi": _BASE,
    "qwen3_moe": _BASE | _MOE,
    "smollm3": _BASE | {"no_rope_layers": [1, 0]},
    "stablelm": _BASE,
    "xglm": _IDS
    | {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64},
    "zamba2": _BASE
    | {"layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 8}
    | {"mamba_ngroups": 1, "adapter_rank": 4, "num_mem_blocks": 1, "hybrid_layer_ids": [1], "chunk_size": 16},
}


def build(name: str, **options: Any) -> PreTrainedModel:
    """Return a random float32 model, with weights large enough that mixing documents changes the loss.

    Args:
        name: one of `FIELDS`; its first word is the family.
        options: for `from_config`.
    """
    return random_model(AutoConfig.for_model(name.split()[0], **FIELDS[name]), **options)


def random_model(config: Any, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).eval()
    for weight in model.parameters():
        if weight.ndim >= 2:
            weight.data.normal_(0, 0.6 * weight.shape[-1] ** -0.5)
    return model


def documents() -> list[list[int]]:
    """Return three documents of uneven length."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (23, 19, 9)]


def loss_alone(model: Any) -> Tensor:
    """Return the mean loss of the documents' tokens, each document in a row of its own."""
    rows = [torch.tensor([ids]) for ids in documents()]
    sums = [_summed(model(input_ids=ids, use_cache=False).logits, ids) for ids in rows]
    return torch.stack(sums).sum() / sum(ids.shape[1] - 1 for ids in rows)


def loss_packed(model: Any, form: Form | None) -> Tensor:
    """Return the same loss with the documents packed into two padded rows, in a form or as the collator packs them."""
    first, second, third = documents()
    packed = ((first + third, [len(first), len(third)]), (second, [len(second)]))
    rows = [{"input_ids": ids, "labels": ids, "seq_lengths": lengths} for ids, lengths in packed]
    batch = PackedCollator(0, 48, padding_mask=form is not None)(rows)
    labels = batch.pop("labels")
    with nullcontext() if form is None else documents_separated(model, form):
        logits = model(**batch, use_cache=False).logits
    return _summed(logits, labels) / (labels[:, 1:] != -100).sum()


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
