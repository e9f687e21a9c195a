"""Checks the gradient norm of DeepSpeed's ZeRO optimizers before each update, and can skip the update.

DeepSpeed updates the weights inside `backward`, so transformers' hook before an update is too late. Both optimizers
(`stage_1_and_2.py`, `stage3.py`) call `_update_scale(overflow)` once per update, after the norm is known, and skip the
update if `overflow` is set afterwards. They do so for float16's loss scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def check_updates(optimizer: Any, allows: Callable[[float], bool]) -> None:
    """Call `allows` with the global gradient norm before each update, and skip the update if it returns False.

    All workers call it at the same time. It is not called for an overflow of float16's loss scaling, which is a normal
    event.

    Args:
        optimizer: a `DeepSpeedZeroOptimizer` or `DeepSpeedZeroOptimizer_Stage3`.
        allows: returns whether to update, given the norm, which is NaN if it is not finite.
    """
    norms = _Norms(optimizer)
    scale = optimizer._update_scale

    def update_scale(overflow: bool = False) -> None:
        scaling = optimizer.dtype == torch.float16 and overflow
        if not scaling and not allows(math.nan if overflow else norms.take()):
            optimizer.overflow = True
            norms.take()
        scale(scaling)

    optimizer._update_scale = update_scale


def clear_overflow(optimizer: Any) -> None:
    """Count a skipped update as a step, because the learning rate schedule follows the steps."""
    optimizer.overflow = False


class _Norms:
    """Keeps the norm that the optimizer computes, so that it is not computed twice."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._last: Any = None
        name = "scaled_global_norm" if hasattr(optimizer, "scaled_global_norm") else "_get_norm_groups"
        self._groups = name == "_get_norm_groups"
        compute = getattr(optimizer, name)

        def keep(*args: Any, **kwargs: Any) -> Any:
            self._last = compute(*args, **kwargs)
            return self._last

        setattr(optimizer, name, keep)

    def take(self) -> float:
        """Return the norm of unscaled gradients since the last call.

        NaN if there is none, or if it is not finite, for which DeepSpeed returns -1.
        """
        last, self._last = self._last, None
        if last is None:
            return math.nan
        if self._groups:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            last = combine_grad_norm_groups(last)
        norm = float(last) / float(self._optimizer.loss_scale)
        return norm if norm >= 0 else math.nan
