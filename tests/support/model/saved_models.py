"""Tiny models in the standard Hugging Face layout, and helpers that change them like published checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

WEIGHTS = "model.safetensors"
TEXT = ["Return the absolute value of the argument.", "Join two or more pathname components."]
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE whose EOS token is also its padding token."""
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(TEXT, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=trainer._tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def make_model(family: str = "llama", **fields: Any) -> PreTrainedModel:
    """Return a randomly initialised model, always the same."""
    torch.manual_seed(0)
    special = {"vocab_size": len(make_tokenizer()), "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    moe = EXPERTS if family == "qwen3_moe" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SHAPE | special | moe | fields)))


def save(model: PreTrainedModel, directory: Path) -> Path:
    """Save a model with the tokenizer."""
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def changed(source: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Copy a saved model with changed tensors."""
    shutil.copytree(source, target)
    save_file(change(load_file(source / WEIGHTS)), target / WEIGHTS, metadata={"format": "pt"})
    return target


def configure(directory: Path, file: str = "config.json", **fields: Any) -> Path:
    """Set fields of a JSON file of a saved model."""
    path = directory / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | fields))
    return directory


def logits(model: Any) -> Tensor:
    """Return a model's logits [tokens, vocabulary] of one short row."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(10)[None]).logits[0].float()
