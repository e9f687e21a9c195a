"""Read the keys with which several tools mark whether a message carries loss."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from finetune_trainer.data.json_values import FormError, kind_name

HONOURED = ("weight", "train", "loss")
"""`weight: 0 | 1` (OpenAI, Mistral), `train: true | false` (Axolotl), `loss: true | false` (ms-swift)."""
REMEDY = "write `weight: 0` or `train: false` on a message that carries no loss"
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_LOSS_WORDS = {"weight", "weights", "loss", "losses", "train", "trained", "trainable", "training"}
_LOSS_WORDS |= {"mask", "masks", "masked", "masking"}


@lru_cache(maxsize=1024)
def affects_loss(key: str) -> bool:
    """Return whether a key's name refers to the loss, such as `loss_scale`, `masked` or `trainDetail`."""
    return any(word.lower() in _LOSS_WORDS for word in _WORDS.findall(key))


def carries_loss(message: dict[str, Any], role: str, where: str) -> bool:
    """Return False if the message's keys exclude it from the loss, else True.

    Args:
        role: the message's normalized role. Only an assistant's message can carry loss.

    Raises:
        FormError: a key is unknown, has another value than 0, 1, true or false, contradicts another key, or requests
            loss on a message that is not an assistant's.
    """
    flags = {key: _flag(key, value, where) for key, value in message.items() if value is not None and affects_loss(key)}
    if not flags:
        return True
    if len(set(flags.values())) > 1:
        raise FormError(f"{where}: {' and '.join(f'`{key}`' for key in flags)} contradict each other: keep one of them")
    if role != "assistant" and any(flags.values()):
        key = next(iter(flags))
        raise FormError(
            f"{where}.{key} is {message[key]!r}, but the message is of role {role!r} and only an assistant's messages "
            f"carry loss: set it to 0 or false, or remove it"
        )
    return all(flags.values())


def _flag(key: str, value: Any, where: str) -> bool:
    if key not in HONOURED:
        raise FormError(f"{where}.{key} affects the loss and is not supported: {REMEDY}, and remove or rename `{key}`")
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        shown = repr(value) if isinstance(value, str | int | float) else kind_name(value)
        raise FormError(f"{where}.{key} is {shown}, expected 0 or 1 (or false, true): {REMEDY}, and 1 on any other")
    return bool(value)
