"""A look at the gradients of DeepSpeed's ZeRO optimizers between their norm and their update.

DeepSpeed updates the weights inside `backward`, so that transformers' hook before an update comes too late. Both
optimizers (`stage_1_and_2.py`, `stage3.py`) call `_update_scale(overflow)` once per update, after the norm is known,
and leave the update out where `overflow` is set then. That is what they do for float16's loss scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def judge_updates(optimizer: Any, allows: Callable[[float], bool]) -> None:
    """Ask `allows`, given the global gradient norm, before each update; without its consent the update is left out.

    Every worker asks at the same time. An overflow of float16's loss scaling is not asked about: it is a normal event.

    Args:
        optimizer: a `DeepSpeedZeroOptimizer` or `DeepSpeedZeroOptimizer_Stage3`.
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


def forget_overflow(optimizer: Any) -> None:
    """Let an update that was left out count as a step: the learning rate's schedule follows the steps."""
    optimizer.overflow = False


class _Norms:
    """Keeps the norm that the optimizer works out, so that it is not worked out twice."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._last: Any = None
        name = "scaled_global_norm" if hasattr(optimizer, "scaled_global_norm") else "_get_norm_groups"
        self._groups = name == "_get_norm_groups"
        work_out = getattr(optimizer, name)

        def keep(*args: Any, **kwargs: Any) -> Any:
            self._last = work_out(*args, **kwargs)
            return self._last

        setattr(optimizer, name, keep)

    def take(self) -> float:
        """Return the norm since the last call, of unscaled gradients; NaN where there is none or it is not finite,
        which DeepSpeed tells by -1."""
        found, self._last = self._last, None
        if found is None:
            return math.nan
        if self._groups:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            found = combine_grad_norm_groups(found)
        norm = float(found) / float(self._optimizer.loss_scale)
        return norm if norm >= 0 else math.nan
