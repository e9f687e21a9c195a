"""Translates the fields of a stage into transformers' TrainingArguments."""

from __future__ import annotations

from typing import Any

import torch

from finetune_api.stages import PreferenceLoss
from finetune_api.training import TrainingSpec
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.deepspeed import deepspeed_config

# transformers' `constant` ignores the warm-up that a job may set.
_SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def training_arguments(context: StageContext) -> dict[str, Any]:
    """Return keyword arguments for `TrainingArguments` and its subclasses (SFTConfig, DPOConfig)."""
    spec = context.spec
    return {
        "output_dir": str(context.output_dir),
        **_optimization(spec),
        "gradient_accumulation_steps": context.division.accumulation,
        "ignore_data_skip": spec.data.streaming,  # a stream resumes by itself; transformers would read it again
        **_intervals(spec, has_eval=context.data.eval is not None),
        **context.precision.autocast,
        "use_cpu": not context.placement.accelerator,
        "gradient_checkpointing": spec.gradient_checkpointing,
        "dataloader_num_workers": spec.dataloader_num_workers,
        "dataloader_pin_memory": context.placement.accelerator,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": context.run.job.spec.run_policy.ddp_timeout,
        # No model changes its buffers in training. A broadcast before each pass would make fast workers wait.
        "ddp_broadcast_buffers": False,
        "deepspeed": deepspeed_config(
            context.run.job.spec.sharding,
            context.zero,
            context.placement.accelerator,
            trained=context.trained,
            accumulates=context.division.accumulation > 1 and context.precision.compute == torch.bfloat16,
            universal=context.resumed is not None and context.resumed.universal,
        ),
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def loss_arguments(spec: PreferenceLoss) -> dict[str, Any]:
    """Return the fields of a preference loss as keyword arguments of TRL's `DPOConfig`."""
    return {
        "beta": spec.beta,
        "loss_type": spec.loss_type,
        "loss_weights": spec.loss_weights,
        "label_smoothing": spec.label_smoothing,
    }


def _optimization(spec: TrainingSpec) -> dict[str, Any]:
    return {
        "num_train_epochs": spec.num_train_epochs,
        "max_steps": spec.max_steps or -1,
        "per_device_train_batch_size": spec.per_device_train_batch_size,
        "per_device_eval_batch_size": spec.per_device_eval_batch_size,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": _SCHEDULERS[spec.lr_scheduler_type],
        # transformers 5 reads a number below 1 as a fraction of all steps.
        "warmup_steps": spec.warmup_steps if spec.warmup_steps is not None else spec.warmup_ratio,
        "weight_decay": spec.weight_decay,
        "adam_beta1": spec.adam_beta1,
        "adam_beta2": spec.adam_beta2,
        "adam_epsilon": spec.adam_epsilon,
        "max_grad_norm": spec.max_grad_norm,
        "seed": spec.seed,
        "data_seed": spec.seed,
    }


def _intervals(spec: TrainingSpec, has_eval: bool) -> dict[str, Any]:
    periodic = has_eval and spec.eval_steps is not None
    return {
        "logging_steps": spec.logging_steps,
        "logging_nan_inf_filter": False,  # a NaN loss must be logged, not filtered from the mean
        "eval_strategy": "steps" if periodic else "no",
        "eval_steps": spec.eval_steps if periodic else None,
        "save_strategy": "steps",
        "save_steps": spec.save_steps,
        "save_total_limit": None,  # the checkpoint store deletes old checkpoints
    }
