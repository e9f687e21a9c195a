"""Estimate a worker's memory by part, from a model's size and a stage's settings."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from finetune_trainer.plan.activations import activation_bytes, drawing_bytes, loss_bytes
from finetune_trainer.plan.attention_masks import MaskedLayers, mask_bytes
from finetune_trainer.plan.communication import buffer_bytes, nccl_bytes
from finetune_trainer.plan.expert_copies import expert_copy_bytes
from finetune_trainer.plan.model_size import AdapterSize, ModelSize
from finetune_trainer.plan.states import gradient_bytes, optimizer_bytes, reference_bytes, weight_bytes

CONTEXT = {"cuda": 640 << 20, "cpu": 700 << 20}
"""Bytes of a process before it loads a model: the CUDA context with kernels and cuBLAS workspaces; on a CPU the
libraries. The metric `memory_context` is the measured value."""


@dataclass(frozen=True)
class Workload:
    """Settings of a stage that its memory depends on."""

    batch: int
    """Sequences per forward pass of a worker (DPO: chosen and rejected, so twice the rows)."""
    length: int
    """Tokens per sequence."""
    dtype_bytes: int = 2
    """Bytes per element of the compute dtype: 2 for half precision, 4 for float32."""
    zero: int = 0
    workers: int = 1
    adapter: AdapterSize | None = None
    """Size of the adapter, or None if weights of the model itself are trained."""
    tuned: int | None = None
    """Number of trained weights if the others are frozen (ESFT); None for full training or an adapter."""
    tuned_embeddings: bool = False
    """Whether `tuned` includes the embeddings and norms."""
    quantized_bits: int | None = None
    double_quant: bool = True
    accumulation: int = 1
    """Forward and backward passes of a worker per optimizer step."""
    checkpointing: bool = False
    eager: bool = False
    """Whether attention materializes its scores."""
    summed_stacks: bool = False
    """Whether LoRA on stacked experts computes the sums `W + BA`; else it uses the factors."""
    masked: MaskedLayers = field(default_factory=MaskedLayers)
    """Attention layers under `sdpa` that get a mask."""
    full_logits: bool = False
    """Whether logits of the whole batch are computed at once (masked language modeling); else in TRL's tiles."""
    no_logits: bool = False
    """Whether the model returns one score per sequence instead of logits (reward models)."""
    reference: bool = False
    """Whether a second model of the same size is loaded as the reference."""
    drawn: int = 0
    """Completions generated concurrently, each `length` tokens long with its prompt; 0 without generation."""
    scorers: int = 0
    """Parameters of the reward models, which every worker loads whole in the compute dtype."""
    offload_optimizer: bool = False
    offload_param: bool = False
    kind: str = "cuda"
    engine: int = 0
    """Bytes that vLLM reserves throughout the training; 0 if transformers generates."""

    @property
    def frozen(self) -> bool:
        """Whether only an adapter or selected weights are trained."""
        return self.adapter is not None or self.tuned is not None


@dataclass(frozen=True)
class Memory:
    """Bytes of a worker by part, on its device and offloaded to the host."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    """Working set of the loss: logits, or tiles of them, and their gradients."""
    reference: int
    buffers: int
    """Communication buckets, gathered weights, copies in another dtype."""
    context: int
    """CUDA context; on a CPU the process with its libraries."""
    nccl: int = 0
    """Buffers of NCCL, which torch's allocator does not count."""
    experts: int = 0
    """Copies of stacked experts: casts of float32 weights, LoRA's factors, or their sums with the weights."""
    drawing: int = 0
    """Memory of vLLM, or of generation in excess of activations and loss, which are not allocated at the same time."""
    scorers: int = 0
    """Reward models."""
    attention_masks: int = 0
    """Masks under `sdpa`, and the bias that torch makes from them in each layer."""
    host: int = 0
    """Offloaded to the host."""

    @property
    def total(self) -> int:
        """Total bytes on the device."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the bytes on the device by part."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "host"}


def estimate(size: ModelSize, load: Workload) -> Memory:
    """Return the peak memory of a worker in a training step."""
    weights, gradients, optimizer = (
        weight_bytes(size, load),
        gradient_bytes(size, load),
        optimizer_bytes(size, load),
    )
    host = (optimizer if load.offload_optimizer else 0) + (weights if load.offload_param else 0)
    activations, loss = activation_bytes(size, load), loss_bytes(size, load)
    return Memory(
        weights=0 if load.offload_param else weights,
        gradients=gradients,
        optimizer=0 if load.offload_optimizer else optimizer,
        activations=activations,
        loss=loss,
        reference=reference_bytes(size, load),
        buffers=buffer_bytes(size, load),
        context=CONTEXT[load.kind],
        nccl=nccl_bytes(load),
        experts=expert_copy_bytes(size, load),
        drawing=load.engine or max(drawing_bytes(size, load) - activations - loss, 0),
        scorers=load.scorers * load.dtype_bytes,
        attention_masks=mask_bytes(load.masked, load.batch, load.length, load.dtype_bytes, load.checkpointing),
        host=host,
    )


def with_zero(load: Workload, zero: int) -> Workload:
    """Return the workload at another ZeRO stage."""
    return replace(load, zero=zero)
