"""Generation with cuDNN's attention and without it, over growing lengths."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch

from gpu_checks.models import make_tokenizer, saved_model, text_of
from gpu_checks.processes import run_alone
from gpu_checks.record import NEEDS_GPU, Json, Options, Skipped, require

SETTINGS = {"default": None, "with_cudnn": "0", "deprioritized": "1"}
"""Values of torch's variable: as the product generates, with torch's own choice, and without cuDNN everywhere."""


def generation(options: Options) -> Json:
    """Milliseconds per token for each setting, each in a process of its own, since torch reads the variable once."""
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
    """Milliseconds per token of answers after prompts of growing lengths, and whether cuDNN was allowed meanwhile."""
    from finetune_trainer.generation.attention import VARIABLE
    from finetune_trainer.generation.load import load
    from finetune_trainer.generation.options import GenerationOptions

    os.environ.pop(VARIABLE, None)
    os.environ |= {VARIABLE: setting} if setting is not None else {}
    loaded = load(str(saved_model(options, "0.6B")), device=options.device)
    allowed: list[bool] = []
    loaded.model.register_forward_pre_hook(lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled()))
    lengths, tokens = ((16, 32), 4) if options.tiny else ((128, 512, 1024), 48)
    asked = GenerationOptions(max_new_tokens=tokens)
    found = []
    for length in lengths:
        ids = make_tokenizer(options)(text_of(options, length))["input_ids"]
        found.append(1000 * statistics.median(_seconds(loaded, ids, asked) for _ in range(2)) / tokens)
    return {"lengths": list(lengths), "ms_per_token": found, "cudnn": any(allowed)}


def _seconds(loaded: Any, ids: list[int], asked: Any) -> float:
    """Seconds of a batch of two prompts, one shorter so that the batch is padded."""
    from finetune_trainer.generation.batches import generate_batch

    started = time.perf_counter()
    generate_batch(loaded.model, loaded.tokenizer, [ids, ids[:-3]], asked)
    return time.perf_counter() - started
