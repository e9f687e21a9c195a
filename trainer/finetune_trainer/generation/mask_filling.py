"""Predict the masked tokens of a text with a masked language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import pipeline

from finetune_trainer.errors import UserError
from finetune_trainer.generation.load import Loaded


@dataclass(frozen=True)
class Prediction:
    """One candidate for a mask."""

    token: str
    probability: float


def fill(loaded: Loaded, text: str, top_k: int = 5) -> list[list[Prediction]]:
    """Return the `top_k` most likely tokens for each mask token in `text`, the most likely first.

    Raises:
        UserError: the model is not a masked language model, or `text` has no mask token.
    """
    if loaded.kind != "masked":
        raise UserError("this model continues text and fills no masks: use generate")
    mask = str(loaded.tokenizer.mask_token)
    if mask not in text:
        raise UserError(f"got {text!r}, expected a text with the mask token {mask}")
    # transformers' stubs require one tokenizer class; the pipeline accepts any.
    filler: Any = pipeline("fill-mask", model=loaded.model, tokenizer=loaded.tokenizer, device=loaded.model.device)  # type: ignore[call-overload]
    found = filler(text, top_k=top_k)
    masks = found if text.count(mask) > 1 else [found]
    return [[Prediction(str(each["token_str"]), float(each["score"])) for each in candidates] for candidates in masks]
