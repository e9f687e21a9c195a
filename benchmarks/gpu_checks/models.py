"""Models of random weights, their tokenizer, and rows of known lengths, without downloads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gpu_checks.record import Json, Options

_QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936,
          "max_position_embeddings": 40_960}  # fmt: skip
SHAPES: dict[str, Json] = {
    "0.6B": _QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                      "num_attention_heads": 16, "tie_word_embeddings": True},
    "1.7B": _QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
                      "num_attention_heads": 16, "tie_word_embeddings": True},
    "8B": _QWEN3 | {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
                    "num_attention_heads": 32, "tie_word_embeddings": False},
    "moe": _QWEN3 | {"model_type": "qwen3_moe", "hidden_size": 1024, "intermediate_size": 3072,
                     "moe_intermediate_size": 384, "num_hidden_layers": 12, "num_attention_heads": 16,
                     "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True,
                     "tie_word_embeddings": True},
}  # fmt: skip
"""The shapes of Qwen3-0.6B, -1.7B and -8B by their config.json, and a small Qwen3-MoE."""
_TINY: Json = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}  # fmt: skip
_TINY_EXPERTS: Json = {"moe_intermediate_size": 16, "num_experts": 16, "num_experts_per_tok": 4}
WORDS = [f"{a} plus {b} makes {a + b}, says the teacher. " for a in range(10) for b in range(10)]


def saved_model(options: Options, shape: str) -> Path:
    """Return the directory of a model, after creating it if necessary.

    Its weights are bfloat16 on a GPU and float32 with `--tiny`.
    """
    directory = options.work / f"model-{shape}"
    if directory.is_dir():
        return directory
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(options)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(**fields_of(options, shape), **special)
    torch.manual_seed(0)
    with torch.device(options.device):
        dtype = torch.float32 if options.tiny else torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    made = directory.with_suffix(".part")
    shutil.rmtree(made, ignore_errors=True)  # left by a check that timed out
    for part in (model, tokenizer):
        part.save_pretrained(made)
    made.rename(directory)
    del model
    if options.accelerator:
        torch.cuda.empty_cache()
    return directory


def fields_of(options: Options, shape: str) -> Json:
    """Return the configuration of a shape; with `--tiny`, of a small model of the same family."""
    fields = SHAPES[shape]
    if not options.tiny:
        return fields
    small = _TINY | {"vocab_size": len(make_tokenizer(options))}
    return fields | small | (_TINY_EXPERTS if "num_experts" in fields else {})


def make_tokenizer(options: Options) -> Any:
    """Return a byte-level tokenizer with ChatML's template, as a `tokenizer` stage trains it."""
    return _tokenizer(512 if options.tiny else 40_960)


@cache
def _tokenizer(context: int) -> Any:
    from finetune_api.stages import TokenizerSpec
    from finetune_trainer.stages.tokenizer.stage import train_tokenizer

    spec = TokenizerSpec.model_validate({"data": {"sources": [{"inline": [{"text": "x"}]}]}, "vocabSize": 400})
    return train_tokenizer(spec, WORDS, context)


def text_of(options: Options, tokens: int, number: int = 0) -> str:
    """Return a text of about so many tokens, a different one for each `number`."""
    tokenizer, line = make_tokenizer(options), "".join(WORDS[number % 50 : number % 50 + 10])
    each = len(tokenizer(line)["input_ids"])
    ids = tokenizer(line * (tokens // each + 1))["input_ids"][:tokens]
    return str(tokenizer.decode(ids))


def dialogues(options: Options, count: int, tokens: int) -> list[Json]:
    """Return conversations whose rows have at most `tokens` tokens, and almost as many."""
    around = 24  # tokens of the template and the question
    return [
        {
            "messages": [
                {"role": "user", "content": f"{number}?"},
                {"role": "assistant", "content": text_of(options, max(tokens - around, 1), number)},
            ]
        }
        for number in range(count)
    ]


def pairs(options: Options, count: int, tokens: int) -> list[Json]:
    """Return preference pairs whose sides have about so many tokens."""
    sides = [text_of(options, tokens, number) for number in range(2 * count)]
    return [{"prompt": f"{at}: ", "chosen": sides[2 * at], "rejected": sides[2 * at + 1]} for at in range(count)]


def write_rows(options: Options, name: str, rows: Iterable[Json]) -> Json:
    """Write rows to a file, and return a stage's `data` that reads them in order."""
    path = options.work / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"sources": [{"file": str(path)}], "shuffle": False}
