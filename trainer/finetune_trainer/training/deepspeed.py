"""DeepSpeed's configuration for a job's sharding."""

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
    """Return what `TrainingArguments.deepspeed` takes; None for ZeRO-0, which is torch's own data parallelism.

    Args:
        trained: parameters with a gradient, which bound the communication buckets; None where unknown.
        accumulates: whether a step adds up several bfloat16 gradients. Under ZeRO-2 and 3 they are then added in
            float32: a bfloat16 sum of 8 bits loses small contributions.
        universal: the checkpoint to resume from is a universal one.
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


def mend_universal(optimizer: Any, weight_decays: list[float]) -> None:
    """Undo what DeepSpeed 0.19 gets wrong in an optimizer loaded from a universal ZeRO-3 checkpoint.

    All sub-groups share one `step` tensor, which each of them then advances; and every parameter group has the first
    one's settings, so that norms and biases would decay too.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    for group, decay in zip(optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = decay


def set_group_timeout(seconds: int) -> None:
    """Give every process group that is made later the time limit of the first one.

    torch gives a group that names no limit, as DeepSpeed's, its own default (10 minutes for NCCL).
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
