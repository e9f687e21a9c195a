"""DeepSpeed: its configuration for a job's sharding, its process group, and repairs of its optimizer."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d

from finetune_api.cluster import Sharding
from finetune_trainer.plan.communication import bucket_size


def deepspeed_config(
    sharding: Sharding,
    zero: int,
    accelerator: bool,
    *,
    trained: int | None = None,
    accumulates: bool = False,
    universal: bool = False,
) -> dict[str, Any] | None:
    """Return the value of `TrainingArguments.deepspeed`; None for ZeRO-0, which is torch's data parallelism.

    Args:
        sharding: the sharding of the job.
        zero: ZeRO stage, 0 to 3.
        accelerator: whether the workers use GPUs.
        trained: parameters with a gradient, which limit the size of communication buckets; None if unknown.
        accumulates: whether a step accumulates several bfloat16 gradients. Under ZeRO-2 and 3 they are then added in
            float32, because a bfloat16 sum, with 8 bits of precision, loses small contributions.
        universal: whether the checkpoint to resume from is a universal one.
    """
    if zero == 0:
        return None
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": _zero_optimization(sharding, zero, accelerator, bucket_size(trained)),
        **({"data_types": {"grad_accum_dtype": "fp32"}} if accumulates and zero >= 2 else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        **({"checkpoint": {"load_universal": True}} if universal else {}),
    }


def _zero_optimization(sharding: Sharding, zero: int, accelerator: bool, bucket: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "stage": zero,
        "overlap_comm": accelerator,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if sharding.offload_optimizer:
        config["offload_optimizer"] = {"device": "cpu", "pin_memory": accelerator}
    if sharding.offload_param:
        config["offload_param"] = {"device": "cpu", "pin_memory": accelerator}
    if zero == 3:
        config["stage3_gather_16bit_weights_on_model_save"] = True
    return config


def repair_universal(optimizer: Any, weight_decays: list[float]) -> None:
    """Repair an optimizer that DeepSpeed 0.19 has loaded from a universal ZeRO-3 checkpoint.

    DeepSpeed lets all sub-groups share one `step` tensor, which each of them increments, and gives every parameter
    group the settings of the first one, so that norms and biases would decay too.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    for group, decay in zip(optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = decay


def set_group_timeout(seconds: int) -> None:
    """Set the default timeout of process groups that are created later.

    torch applies its own default (10 minutes for NCCL) to a group without a timeout, such as DeepSpeed's.
    """
    distributed_c10d.default_pg_timeout = timedelta(seconds=seconds)
    distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=seconds)


def join_process_group(zero: int, accelerator: bool) -> None:
    """Make DeepSpeed use the process group that Ray Train set up; before a ZeRO-3 model loads.

    On CPUs DeepSpeed would compile a shared-memory transport (about a minute); gloo does without.
    """
    if zero == 0:
        return
    import deepspeed

    if not accelerator:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if accelerator else "gloo", verbose=False)
