"""Tiny random models of composite families: each family's default configuration, made small."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel

VOCAB, SPECIAL = 448, 410
"""The test tokenizer has 400 entries; ids from `SPECIAL` on mark images and sound, and do not occur in text."""
FIELDS: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "n_embd", "dim", "out_hidden_size", "projection_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "n_layer", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_head_dim", "moe_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "sliding_window"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "patch_size", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("num_blocks", "num_encoder_layers", "num_global_layers", "n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "perceiver_layers"), 1),
    **dict.fromkeys(("linear_num_value_heads", "num_query_tokens"), 4),
    "linear_num_key_heads": 2,
    "base_channels": 32,
    "num_res_blocks": 1,
    "downsample_hidden_size": 32,
    "image_size": 32,
    "vision_output_dim": 64,
    "max_position_embeddings": 256,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "pad_token_id": 0,
}
_LAYERS = ("layer_types", "mlp_layer_types")
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "head_dim": 16, "position_embedding_size": 64, "pooling_kernel_size": 2,
}  # fmt: skip
_SQUARE = {"vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}}


def _axes(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}}


_HALF = {"text_config": _axes(1, 1, 2, partial_rotary_factor=0.5)}
_WHOLE = {"text_config": _axes(2, 3, 3)}
_THINKER = {"vision_start_token_id": 440, "audio_token_id": 441, "image_token_id": 442, "video_token_id": 443}
_GEMMA4 = {
    "text_config": _TEXT | {
        "head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"], "per_layer_config": {"01": {"head_dim": 32}},
    },
    "vision_config": _VISION, "image_token_id": 440, "video_token_id": 441, "audio_token_id": 442, "boi_token_id": 443,
    "eoi_token_id": 444, "boa_token_id": 445, "eoa_token_index": 446,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": SPECIAL}},
    "cosmos3_edge": _WHOLE,
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2,
                                      "n_group": 1, "topk_group": 1}},
    "emu3": {"vocabulary_map": {"<image>": SPECIAL, "<|extra_200|>": SPECIAL + 1}, "text_config": {
             "attention_dropout": 0.0}, "vq_config": {"channel_multiplier": [1, 1]}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [16, 8], "mlp_layer_types": ["dense", "sparse"],
                                        "moe_k": 2, **_axes(2, 2, 4)}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "glm46v": _HALF, "glm4v": _HALF, "glm4v_moe": _HALF, "glmga": _HALF, "glm_ocr": _WHOLE,
    "hunyuan_vl": {"text_config": {"head_dim": 16, **_axes(2, 3, 3)}, "vision_config": {"text_hidden_size": 32}},
    "internvl": _SQUARE, "qianfan_ocr": _SQUARE,
    "kimi_k25": {"text_config": {"head_dim": 8}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "paddleocr_vl": _WHOLE, "qwen2_5_omni_thinker": _WHOLE | _THINKER, "qwen3_omni_moe_thinker": _WHOLE | _THINKER,
}  # fmt: skip
"""Changes to the shrunken configuration, by family."""
WHOLE: dict[str, dict[str, Any]] = {
    "gemma4": _GEMMA4,
    "gemma4_unified": _GEMMA4 | {"vision_config": {**_VISION, "mm_embed_dim": 32}},
    "mllama": {
        "text_config": _TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {
            "hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
            "intermediate_size": 32, "image_size": 32, "patch_size": 8, "intermediate_layers_indices": [0],
            "vision_output_dim": 32, "supported_aspect_ratios": [[1, 1], [1, 2]], "max_num_tiles": 2,
        },
        "image_token_index": 440,
    },
    "qwen2_vl": {
        "text_config": _TEXT | _axes(2, 3, 3),
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        **_THINKER,
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | _axes(2, 3, 3),
        "vision_config": {
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 8,
        },
        **_THINKER,
    },
}  # fmt: skip
"""Fields of families whose default configuration cannot be shrunk."""


def config_of(family: str, **more: Any) -> PretrainedConfig:
    """Return the configuration of a tiny model of a family."""
    if family in WHOLE:
        return AutoConfig.for_model(family, **(WHOLE[family] | more))
    config = AutoConfig.for_model(family, **more)
    _shrink(config)
    _change(config, CHANGES.get(family, {}))
    return config


def build(family: str, dtype: torch.dtype = torch.float32, auto: Any = AutoModelForMultimodalLM) -> PreTrainedModel:
    """Return a model whose weights are all random, also norms and gates, so that each affects the output."""
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config_of(family), dtype=dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.08) if weight.ndim > 1 else weight.add_(0.02 * torch.randn_like(weight))
    return model


def _shrink(config: PretrainedConfig) -> None:
    for name, value in FIELDS.items():
        if isinstance(_get(config, name), int | float) and not isinstance(_get(config, name), bool):
            setattr(config, name, value)
    for number, name in enumerate(
        sorted(name for name in vars(config) if name.endswith(("_token_id", "_token_index")))
    ):
        given = _get(config, name)
        if isinstance(given, int) and given >= SPECIAL and name != "pad_token_id":
            setattr(config, name, SPECIAL + number)
    for name in _LAYERS:
        if isinstance(given := _get(config, name), list):
            kinds = list(dict.fromkeys(given))
            setattr(config, name, (kinds * 2)[:2])
    for name in getattr(config, "sub_configs", {}):
        if isinstance(part := _get(config, name), PretrainedConfig):
            _shrink(part)


def _change(config: Any, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        part = _get(config, name)
        if isinstance(part, PretrainedConfig):
            _change(part, value)
        else:
            setattr(config, name, value)


def _get(config: Any, name: str) -> Any:
    with suppress(Exception):  # reading fields that differ among layers raises
        return getattr(config, name, None)
    return None
