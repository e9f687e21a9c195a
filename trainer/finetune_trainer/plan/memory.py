"""Memory of one worker, by part, as pure functions of a model's size and a stage's settings."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from finetune_trainer.plan.activations import activation_bytes, drawing_bytes, loss_bytes
from finetune_trainer.plan.attention_masks import MaskedLayers, mask_bytes
from finetune_trainer.plan.communication import buffer_bytes, nccl_bytes
from finetune_trainer.plan.expert_copies import expert_copy_bytes
from finetune_trainer.plan.model_size import AdapterSize, ModelSize
from finetune_trainer.plan.states import gradient_bytes, optimizer_bytes, reference_bytes, weight_bytes

CONTEXT = {"cuda": 640 << 20, "cpu": 700 << 20}
"""What a process takes before it holds a model: CUDA's context with its kernels and cuBLAS's workspaces; on a CPU the
libraries. `memory_context` in the metrics has the measured value."""


@dataclass(frozen=True)
class Workload:
    """What of a stage the memory depends on. Bytes are per element."""

    batch: int
    """Sequences in one forward pass of a worker (DPO: chosen and rejected, so twice the rows)."""
    length: int
    """Tokens per sequence."""
    dtype_bytes: int = 2
    """Of the dtype it computes in: 2 for half precision, 4 for float32."""
    zero: int = 0
    workers: int = 1
    adapter: AdapterSize | None = None
    """None where weights of the model itself are trained."""
    tuned: int | None = None
    """Weights of the model that are trained while the others are frozen (ESFT); None: all of them, or an adapter."""
    tuned_embeddings: bool = False
    """Whether those include the embeddings and norms."""
    quantized_bits: int | None = None
    double_quant: bool = True
    accumulation: int = 1
    """Forward and backward passes of a worker per optimizer step."""
    checkpointing: bool = False
    eager: bool = False
    """Attention that materialises its scores."""
    summed_stacks: bool = False
    """LoRA on stacked experts by sums `W + BA`; else by its factors."""
    masked: MaskedLayers = field(default_factory=MaskedLayers)
    """Attention layers under `sdpa` that get a mask."""
    full_logits: bool = False
    """Logits of the whole batch at once (masked language modelling); else TRL's tiles."""
    no_logits: bool = False
    """One number for each sequence in place of logits (reward models)."""
    reference: bool = False
    """A second model with the weights of the first, as the reference."""
    drawn: int = 0
    """Answers drawn at a time, each with its prompt `length` tokens long; 0 in stages that draw none."""
    scorers: int = 0
    """Parameters of reward models, which every worker holds whole in the dtype."""
    offload_optimizer: bool = False
    offload_param: bool = False
    kind: str = "cuda"
    engine: int = 0
    """Bytes that an inference engine holds all the time beside the training (vLLM); 0: transformers draws."""

    @property
    def frozen(self) -> bool:
        """Whether most of the model is frozen."""
        return self.adapter is not None or self.tuned is not None


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker's device by part, and of the host where something is offloaded."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    """Working set of the loss: logits or tiles of them, and their gradients."""
    reference: int
    buffers: int
    """Communication buckets, gathered weights, copies in another dtype."""
    context: int
    """CUDA's context; on a CPU the process with its libraries."""
    nccl: int = 0
    """Buffers of NCCL, which torch's allocator does not count."""
    experts: int = 0
    """Copies of stacked experts: casts of float32 weights, LoRA's factors, or its sums with the weights."""
    drawing: int = 0
    """What drawing answers needs beyond the activations and the loss, which are not there at the same time; or all that
    an inference engine (vLLM) holds."""
    scorers: int = 0
    """Reward models."""
    attention_masks: int = 0
    """Masks under `sdpa`, and the bias that torch makes of them for each layer."""
    host: int = 0
    """On the host, beside the device."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The device's parts by name."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "host"}


def estimate(size: ModelSize, load: Workload) -> Memory:
    """Peak memory of a training step of one worker: what stays, and the larger of activations and loss on top."""
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
    """The same work at another ZeRO stage."""
    return replace(load, zero=zero)
