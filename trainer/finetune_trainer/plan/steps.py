"""Count the optimizer steps of a stage and the FLOPs of a token."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_api.stages import OnlineSpec
from finetune_api.training import TrainingSpec
from finetune_trainer.plan.model_size import ModelSize
from finetune_trainer.plan.rounds import schedule


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of a stage; None if the number of rows is unknown."""

    total: int | None
    per_epoch: int | None
    warmup: int | None
    rows_per_step: int
    """Global batch size: rows of a full step on all workers."""


def count_steps(spec: TrainingSpec, rows: int | None, workers: int = 1) -> Steps:
    """Return the steps of a stage, as transformers 5.23 counts the batches of `training.batches`.

    See `Trainer.set_initial_training_values` and `get_warmup_steps`. The last step of an epoch may have fewer rows.
    """
    per_step = rows_per_step(spec, workers)
    if isinstance(spec, OnlineSpec):
        return _round_steps(spec, rows, per_step)
    per_epoch = None if rows is None else max(math.ceil(rows / per_step), 1) * getattr(spec, "num_iterations", 1)
    total = spec.max_steps
    if total is None and per_epoch is not None:
        total = math.ceil(spec.num_train_epochs * per_epoch)
    return Steps(total, per_epoch, warmup_steps(spec, total), per_step)


def _round_steps(spec: OnlineSpec, rows: int | None, per_step: int) -> Steps:
    """Return the steps of all rounds; `per_epoch` counts one round."""
    if rows is None and spec.max_steps is None and spec.prompts_per_round is None:
        return Steps(None, None, spec.warmup_steps, per_step)
    found = schedule(spec, rows or spec.prompts_per_round or 1, per_step)
    return Steps(found.total, found.steps, warmup_steps(spec, found.total), per_step)


def rows_per_step(spec: TrainingSpec, workers: int) -> int:
    """Return the global batch size: rows of one optimizer step on all workers."""
    return spec.per_device_train_batch_size * spec.gradient_accumulation_steps * workers


def warmup_steps(spec: TrainingSpec, total: int | None) -> int | None:
    """Return the warmup steps: `warmupSteps` if set, else the fraction `warmupRatio` of all steps, rounded up."""
    if spec.warmup_steps is not None:
        return spec.warmup_steps
    return None if total is None else math.ceil(total * spec.warmup_ratio)


def flops_per_token(
    size: ModelSize, length: int, adapter_parameters: int | None = None, extra_forwards: int = 0
) -> float:
    """Return the FLOPs of one training token: `6 N + 12 L H Q T` (PaLM, arXiv 2204.02311, appendix B).

    N is the number of active parameters that a token is multiplied by, L layers, H heads of dimension Q, T tokens per
    row. By convention attention covers the whole row, and recomputed activations do not count. Frozen weights have no
    weight gradients, so with an adapter the base costs 4 N and the adapter 6 N.

    Args:
        adapter_parameters: trainable parameters of an adapter; None if every weight is trained.
        extra_forwards: forward passes without gradients, such as those of the reference model.
    """
    attention = 4 * size.layers * size.heads * size.head_dim * length
    forward = 2 * size.matmul + attention
    trained = 3 * forward if adapter_parameters is None else 4 * size.matmul + 3 * attention + 6 * adapter_parameters
    return float(trained + extra_forwards * forward)


def mfu(flops_per_token: float, tokens_per_second: float, peak: float | None, workers: int = 1) -> float | None:
    """Return the model FLOPs utilization of `workers` devices, from 0 to 1, or None if the peak is unknown.

    Args:
        tokens_per_second: throughput of all workers together.
        peak: peak FLOP/s of one device.
    """
    return flops_per_token * tokens_per_second / (peak * workers) if peak else None
