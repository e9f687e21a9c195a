"""Facts about the composite families of transformers 5.23 for training on text alone.

A composite family joins a language model with image, video or audio encoders in one model with one nested
configuration. `tests/composite` builds a tiny model of every family in `TRAINED` and checks each fact here. A family
that is neither in `TRAINED` nor in `REFUSED` has not been checked and is refused.
"""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

TRAINED = frozenset(
    {
        "aria", "chameleon", "cosmos3_edge", "cosmos3_omni", "deepseek_ocr2", "deepseek_vl", "deepseek_vl_hybrid",
        "emu3", "ernie4_5_vl_moe", "exaone4_5", "fun_asr_nano", "fuyu", "gemma3", "gemma4", "gemma4_unified", "glm46v",
        "glm4v", "glm4v_moe", "glm_ocr", "glmasr", "glmga", "got_ocr2", "granite_docling", "granite_speech",
        "granite_speech_plus", "hunyuan_vl", "hyperclovax_vision_v2", "idefics2", "idefics3", "internvl", "janus",
        "kimi_k25", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llava", "llava_next", "llava_next_video", "llava_onevision",
        "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "mistral3", "mistral4", "mllama", "molmo2",
        "moss_transcribe_diarize", "ovis2", "paddleocr_vl", "phi4_multimodal", "pp_chart2table", "qianfan_ocr",
        "qwen2_5_omni_thinker", "qwen2_5_vl",
        "qwen2_audio", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_asr", "qwen3_omni_moe_thinker", "qwen3_vl",
        "qwen3_vl_moe", "smolvlm", "video_llama_3", "video_llava", "vipllava", "voxtral",
    }
)  # fmt: skip
"""Families whose language model trains on text and whose other parts are saved unchanged. Mistral 4 has no other
parts, but only the auto class of composite models supports it."""

_NEEDS_INPUT = "its model computes nothing without {}"
_UNSCALED = "its composite model in transformers leaves out the scale of the logits that the training loss applies"
_BACKBONE = "TRL's loss does not find the backbone in its composite model"

REFUSED = {
    "aya_vision": _UNSCALED,
    "blip": _NEEDS_INPUT.format("an image"),
    "blip-2": _NEEDS_INPUT.format("an image"),
    "cohere2_vision": _UNSCALED,
    "diffusion_gemma": "it fills blocks of text by diffusion and does not predict the next token",
    "evolla": _NEEDS_INPUT.format("a protein"),
    "florence2": _NEEDS_INPUT.format("an image"),
    "git": "its loss needs an image",
    "idefics": _NEEDS_INPUT.format("an image"),
    "instructblip": _NEEDS_INPUT.format("an image"),
    "instructblipvideo": _NEEDS_INPUT.format("a video"),
    "kosmos-2": _NEEDS_INPUT.format("an image"),
    "kosmos-2.5": _BACKBONE,
    "kyutai_speech_to_text": _NEEDS_INPUT.format("sound"),
    "llama4": _BACKBONE,
    "moshi": "it generates speech, and its causal class leaves out the depth decoder",
    "musicgen": "it generates music",
    "musicgen_melody": "it generates music",
    "nemotron_h_omni": _BACKBONE,
    "paligemma": "each token of a prompt attends to all others (prefix LM), so that a token would see its own label",
    "pi0": "it predicts the actions of a robot",
    "pix2struct": _NEEDS_INPUT.format("an image"),
    "pp_formulanet": _NEEDS_INPUT.format("an image"),
    "qwen2_5_omni": "it has no forward pass for text: only its thinker has one",
    "qwen3_omni_moe": "it has no forward pass for text: only its thinker has one",
    "shieldgemma2": "it classifies images",
    "t5gemma2": "it is an encoder-decoder and does not continue text",
    "udop": _NEEDS_INPUT.format("the boxes of the words on a page"),
    "vision-encoder-decoder": _NEEDS_INPUT.format("an image"),
    "voxtral_realtime": _NEEDS_INPUT.format("sound"),
}
"""Families that can't be trained on text alone, each with the reason."""

INSIDE_DECODER = {
    "chameleon": r"(^|\.)vqmodel(\.|$)",
    "ernie4_5_vl_moe": r"(^|\.)vision_moe(\.|$)",
    "phi4_multimodal": r"(^|\.)embed_tokens_extend(\.|$)",
}
"""Modules inside the decoder that belong to other modalities, as regular expressions."""

POSITION_ROWS = frozenset(
    {
        "cosmos3_edge", "ernie4_5_vl_moe", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "paddleocr_vl",
        "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl",
    }
)  # fmt: skip
"""Families with multimodal rotary positions that need positions [1 + axes, B, L], whose first row counts text tokens,
to separate packed documents. With positions [B, L], tokens would attend to other documents."""

NEEDS_TOKEN_TYPES = frozenset({"molmo2"})
"""Families that require `mm_token_type_ids` [B, L] in training: 0 for text."""

_KNOWN = "a family that has been, such as gemma3, llava_next, mistral3, qwen2_5_vl or qwen3_vl"


def is_composite(config: PretrainedConfig) -> bool:
    """Return whether a configuration describes a language model with encoders of other modalities.

    A checkpoint of a composite family's causal class (`architectures: [Qwen3_5ForCausalLM]`) holds the language model
    alone and counts as a causal model.
    """
    family = config.model_type
    composite, causal = (
        names.get(family) for names in (MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )
    if composite is None:
        return family in REFUSED
    text_only = causal is not None and causal != composite and list(config.architectures or []) == [causal]
    return not text_only and (composite != causal or bool(type(config).sub_configs))


def refusal(config: PretrainedConfig, scores: bool = False) -> str | None:
    """Return why a composite model can't be used here, or None.

    Args:
        scores: whether the model scores texts (a `reward` stage).
    """
    family = config.model_type
    what = f"{family} is a composite model ({', '.join(_parts_of(config)) or 'of several parts'})"
    if family in REFUSED:
        return f"{what} that can't be trained or asked with text alone: {REFUSED[family]}"
    if family not in TRAINED:
        return f"{what} that has not been tried with text alone: use its language model's own checkpoint, or {_KNOWN}"
    if scores and family not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return f"{what}, and transformers has no class of it that scores texts: use a text-only model as reward model"
    return None


def _parts_of(config: PretrainedConfig) -> list[str]:
    return [name.removesuffix("_config") for name in type(config).sub_configs]
