"""Generation with cuDNN's attention and without it, over growing lengths."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from gpu_checks.models import make_tokenizer, saved_model, text_of
from gpu_checks.processes import run_alone
from gpu_checks.record import NEEDS_GPU, Json, Options, Skipped, require

SETTINGS = {"default": None, "with_cudnn": "0", "deprioritized": "1"}
"""Values of torch's variable: the product's default, torch's own choice, and without cuDNN everywhere."""


def generation(options: Options) -> Json:
    """Return milliseconds per token for each setting, in a process each, because torch reads the variable once."""
    values: Json = {}
    for name, setting in SETTINGS.items():
        found, tail = run_alone(lambda setting=setting: _timed(options, setting), 60)
        require(found is not None, f"{name}: {tail}", values)
        values[name] = found
    default, cudnn = values["default"]["ms_per_token"][-1], values["with_cudnn"]["ms_per_token"][-1]
    values["gain"] = cudnn / default
    require(not values["default"]["cudnn"], "the product generates with cuDNN's attention", values)
    if options.tiny:
        raise Skipped(NEEDS_GPU, values)
    require(default <= 1.1 * cudnn, "slower without cuDNN's attention", values)
    return values


def _timed(options: Options, setting: str | None) -> Json:
    """Return milliseconds per token after prompts of growing lengths, and whether cuDNN was enabled."""
    from finetune_trainer.generation.attention_kernels import VARIABLE
    from finetune_trainer.generation.load import load

    os.environ.pop(VARIABLE, None)
    os.environ |= {VARIABLE: setting} if setting is not None else {}
    loaded = load(str(saved_model(options, "0.6B")), device=options.device)
    allowed: list[bool] = []
    loaded.model.register_forward_pre_hook(lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled()))
    lengths, tokens = ((16, 32), 4) if options.tiny else ((128, 512, 1024), 48)
    _seconds_per_token(options, loaded, lengths[0] // 2, tokens)  # loads kernels
    found = [1000 * _seconds_per_token(options, loaded, length, tokens) for length in lengths]
    return {"lengths": list(lengths), "ms_per_token": found, "cudnn": any(allowed)}


def _seconds_per_token(options: Options, loaded: Any, length: int, tokens: int) -> float:
    """Return seconds per token of answers to two prompts, one shorter so that the batch is padded.

    Measured only once: cuDNN keeps its plans, so the same lengths would be fast the second time.
    """
    from finetune_trainer.generation.batches import generate_batch
    from finetune_trainer.generation.options import GenerationOptions

    ids = make_tokenizer(options)(text_of(options, length))["input_ids"]
    started = time.perf_counter()
    answers = generate_batch(loaded.model, loaded.tokenizer, [ids, ids[:-3]], GenerationOptions(max_new_tokens=tokens))
    return (time.perf_counter() - started) / max(len(answer.tokens) for answer in answers)
