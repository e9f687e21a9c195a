"""Memory of the copies of stacked experts that a forward pass makes and autograd saves, and warnings about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from finetune_trainer.plan.model_size import AdapterSize, ModelSize
from finetune_trainer.plan.quantities import human_bytes, human_count
from finetune_trainer.plan.states import MASTER

if TYPE_CHECKING:
    from finetune_trainer.plan.memory import Workload


def expert_copy_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes of copies of stacked experts, and of the gradients of one layer's copies.

    Autograd saves the copies of all layers until the backward pass, or of one layer with gradient checkpointing.
    """
    if not size.expert_layers:
        return 0
    layers = 1 if load.checkpointing else size.expert_layers
    return round(copied_elements(size, load) * load.dtype_bytes * (layers + 1) / size.expert_layers)


def copied_elements(size: ModelSize, load: Workload) -> int:
    """Return the elements of all layers' copies, in the dtype of the computation.

    For LoRA on stacked experts these are its factors (`model.expert_products`), or the sums `W + scaling * B @ A` for
    families without grouped matrix products (PEFT 0.21, `ParamWrapper`). For float32 experts they are the casts.
    """
    if load.adapter is not None:
        return load.adapter.stack_weights if load.summed_stacks else load.adapter.stack_factors
    return cast_elements(size, load)


def cast_elements(size: ModelSize, load: Workload) -> int:
    """Return the number of float32 expert weights that each forward pass casts (ZeRO-0 in half precision)."""
    if load.zero or load.dtype_bytes >= MASTER or load.adapter is not None:
        return 0
    return size.expert if load.tuned is None else min(load.tuned, size.expert)


def expert_warnings(size: ModelSize, load: Workload, path: str) -> Iterator[str]:
    """Yield warnings about settings that cost memory or time with stacked experts, and their remedy.

    Args:
        path: the stage's path in the job, such as `stages[1].sft`.
    """
    if load.adapter is not None and load.adapter.stack_weights:
        yield from _adapted(size, load, load.adapter, f"{path}.lora.targetModules")
    casts = cast_elements(size, load)
    if casts and load.tuned is None and load.kind == "cuda":
        copies = human_bytes(casts * load.dtype_bytes)
        yield (
            f"{path}: at ZeRO-0 the experts are float32, and each forward pass casts {copies} of them: "
            "set sharding.zero to 1, which keeps them in half precision"
        )


def _adapted(size: ModelSize, load: Workload, adapter: AdapterSize, field: str) -> Iterator[str]:
    instead = "name layers of the attention such as q_proj, or use an esft stage"
    if load.summed_stacks:
        copies = human_bytes(expert_copy_bytes(size, load))
        yield f"{field} adapts stacked experts, for which PEFT computes W + BA here: {copies} of copies; {instead}"
    elif 2 * adapter.stack_parameters > adapter.parameters:
        share = f"{human_count(adapter.stack_parameters)} of {human_count(adapter.parameters)} trained weights"
        yield f"{field} adapts all experts, with {share}: to train fewer, {instead}"
