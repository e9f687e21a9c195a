"""Memory of one worker, by part, as pure functions of a model's size and a stage's settings."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from finetune_trainer.plan.attention_masks import MaskedLayers, mask_bytes
from finetune_trainer.plan.model_size import AdapterSize, ModelSize

MASTER = 4
"""Bytes of a float32 copy of a parameter."""
MOMENTS = 8
"""Bytes of AdamW's two float32 moments."""
BUCKET = 500_000_000
"""Most elements of DeepSpeed's reduce and all-gather buckets, its defaults."""
BUCKET_UNIT = 1 << 16
"""A bucket is a multiple of so many elements: DeepSpeed wants a multiple of its NCCL alignment, which is 2."""
LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered at most (`stage3_max_live_parameters`), its default."""
LOSS_TOKENS, LOSS_VOCAB = 4096, 32768
"""Tile in which TRL 1.16 computes logits (`TOKEN_CHUNK_SIZE`, `_CHUNKED_LOGPROB_CHUNK_SIZE`)."""
RUNTIME = {"cuda": 1 << 30, "cpu": 700 << 20}
"""What a process takes before it holds a model: CUDA's context, cuBLAS and NCCL; on a CPU the libraries."""


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
    runtime: int
    drawing: int = 0
    """What drawing answers needs beyond the activations and the loss, which are not there at the same time."""
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
        runtime=RUNTIME[load.kind],
        drawing=max(drawing_bytes(size, load) - activations - loss, 0),
        scorers=load.scorers * load.dtype_bytes,
        attention_masks=mask_bytes(load.masked, load.batch, load.length, load.dtype_bytes, load.checkpointing),
        host=host,
    )


def trainable(size: ModelSize, load: Workload) -> int:
    """Parameters with a gradient."""
    if load.adapter is not None:
        return load.adapter.parameters
    return size.total - size.frozen if load.tuned is None else load.tuned


def weight_bytes(size: ModelSize, load: Workload) -> int:
    """Weights: float32 masters where torch alone trains them (ZeRO-0), else the dtype's; divided by ZeRO-3.

    A composite model's frozen parts are always in the dtype.

    A quantized base has its linear layers in 4 or 8 bits and all else in the dtype; adapters, and weights trained while
    the others are frozen, are float32 at ZeRO-0.
    """
    if load.tuned is not None:
        masters = load.tuned * (MASTER - load.dtype_bytes) if load.zero == 0 else 0
        return _share(size.total * load.dtype_bytes, load, 3) + masters
    if load.adapter is None:
        each = MASTER if load.zero == 0 else load.dtype_bytes
        return _share((size.total - size.frozen) * each + size.frozen * load.dtype_bytes, load, 3)
    base = size.total * load.dtype_bytes
    if load.quantized_bits is not None:
        base -= round(size.linear * (load.dtype_bytes - quantized_weight(load.quantized_bits, load.double_quant)))
    else:
        base = _share(base, load, 3)  # a quantized base is not divided: transformers loads it whole on each worker
    return base + _share(load.adapter.parameters * (MASTER if load.zero == 0 else load.dtype_bytes), load, 3)


def quantized_weight(bits: int, double_quant: bool) -> float:
    """Bytes of a quantized weight with its constants (QLoRA, arXiv 2305.14314, section 3).

    4 bits: one float32 constant per 64 weights, or 8 bits and one float32 per 256 of those; 8 bits: one per row.
    """
    if bits == 8:
        return 1.0
    return 0.5 + (1 / 64 + 4 / (64 * 256) if double_quant else 4 / 64)


def gradient_bytes(size: ModelSize, load: Workload) -> int:
    """Gradients: float32 at ZeRO-0, else the dtype's; divided by ZeRO-2 and 3, which add up several in float32."""
    summed = load.zero >= 2 and load.accumulation > 1
    each = MASTER if load.zero == 0 or summed else load.dtype_bytes
    return _share(trainable(size, load) * each, load, 2)


def optimizer_bytes(size: ModelSize, load: Workload) -> int:
    """AdamW's states: two float32 moments, and DeepSpeed's float32 master copy; divided by ZeRO-1 to 3.

    DeepSpeed keeps that copy of float32 weights too (`stage_1_and_2.py`, `single_partition_of_fp32_groups`).
    """
    each = MOMENTS if load.zero == 0 else MASTER + MOMENTS
    return _share(trainable(size, load) * each, load, 1)


def reference_bytes(size: ModelSize, load: Workload) -> int:
    """The reference's own model, in the format that the model in training is loaded in, divided by ZeRO-3."""
    each = MASTER if load.zero == 0 and not load.frozen else load.dtype_bytes
    return _share(size.total * each, load, 3) if load.reference else 0


def drawing_bytes(size: ModelSize, load: Workload) -> int:
    """Keys and values of all layers for every answer at its longest, its next token's logits, and under ZeRO-3 the
    whole model, which is gathered meanwhile."""
    if not load.drawn:
        return 0
    cache = 2 * size.layers * size.key_value_heads * size.head_dim * load.dtype_bytes * load.length
    logits = size.vocab * (load.dtype_bytes + 2 * MASTER)
    whole = size.total * load.dtype_bytes if load.zero == 3 and load.quantized_bits is None else 0
    return load.drawn * (cache + logits) + whole


def activation_bytes(size: ModelSize, load: Workload) -> int:
    """What the forward pass keeps for the backward pass, in all layers.

    After Korthikanti et al. (arXiv 2205.05198, section 4), counted anew for what transformers' layers save: no
    dropout, grouped key and value heads, gated MLPs, norms in float32. With checkpointing (their section 5) each layer
    keeps its input and one layer at a time has its own in full.
    """
    tokens = load.batch * load.length
    layer = tokens * layer_activations(size, load)
    if load.checkpointing:
        return round(tokens * size.layers * size.hidden * _residual(load) + layer)
    return round(layer * size.layers + tokens * size.hidden * 2 * _residual(load))


def layer_activations(size: ModelSize, load: Workload) -> float:
    """Bytes per token that an average layer keeps."""
    dense_share = 1 - (size.expert_layers / size.layers if size.layers else 0)
    mlp = dense_share * _mlp(size, size.intermediate, load)
    if size.experts:
        mlp += (1 - dense_share) * _experts(size, load)
    return _norms(size, load) + _attention(size, load) + mlp + _adapter(size, load)


def loss_bytes(size: ModelSize, load: Workload) -> int:
    """The loss's working set.

    Full logits: in the dtype, as float32, their log-softmax and the gradient. Tiles: one of logits, its float32
    temporaries, and float32 gradients of the head (where it is trained) and of the hidden states. One number for each
    sequence: the hidden states' gradients.
    """
    tokens = load.batch * load.length
    if load.no_logits:
        return MASTER * tokens * size.hidden
    if load.full_logits:
        return tokens * size.vocab * (12 if load.dtype_bytes == 4 else 14)
    rows = min(tokens, LOSS_TOKENS)
    tile = rows * (LOSS_VOCAB if load.kind == "cuda" else min(LOSS_VOCAB, size.vocab))
    temporaries = 0 if load.kind == "cuda" else 9 * MASTER  # Triton folds in place; torch as measured
    head = 0 if load.frozen else MASTER * size.head
    return tile * (load.dtype_bytes + temporaries) + head + MASTER * tokens * size.hidden


def buffer_bytes(size: ModelSize, load: Workload) -> int:
    """Copies: autocast's half-precision weights and DDP's buckets at ZeRO-0, DeepSpeed's buckets above."""
    count = trainable(size, load)
    if load.zero == 0:
        autocast = load.dtype_bytes * count if load.dtype_bytes < MASTER else 0
        return autocast + (MASTER * count if load.workers > 1 else 0)
    gradient_slice = _share(MASTER * count, load, 1) if load.dtype_bytes < MASTER else 0
    buffers = 2 if load.kind == "cuda" and load.zero < 3 else 1  # two where communication overlaps with computation
    buckets = buffers * bucket_size(count) * load.dtype_bytes
    gathered = min(size.total, LIVE) * load.dtype_bytes if load.zero == 3 and load.quantized_bits is None else 0
    return gradient_slice + buckets + gathered


def bucket_size(trained: int | None) -> int:
    """Return the elements of a communication bucket: no more than there are gradients.

    DeepSpeed allocates a bucket in full, whatever is trained (`stage_1_and_2.py`, `setup_buckets`).

    Args:
        trained: parameters with a gradient; None where unknown.
    """
    if trained is None:
        return BUCKET
    return min(-(-max(trained, 1) // BUCKET_UNIT) * BUCKET_UNIT, BUCKET)


def with_zero(load: Workload, zero: int) -> Workload:
    """The same work at another ZeRO stage."""
    return replace(load, zero=zero)


def _share(count: int, load: Workload, least_zero: int) -> int:
    """A worker's share of what ZeRO divides from stage `least_zero` on."""
    return -(-count // load.workers) if load.zero >= least_zero else count


def _mixed(load: Workload) -> bool:
    """Whether float32 weights compute under autocast, so that the residual stream is float32 too.

    Modules that are trained in full beside adapters give their output in the base's format.
    """
    trained = load.tuned_embeddings or not load.frozen
    return load.zero == 0 and trained and load.dtype_bytes < MASTER


def _residual(load: Workload) -> int:
    return MASTER if _mixed(load) else load.dtype_bytes


def _norms(size: ModelSize, load: Workload) -> float:
    """Two norms per layer: the float32 input, the normalised value where the scale is trained, and the output."""
    frozen = load.frozen
    masks = (load.dtype_bytes if load.kind == "cpu" else 1) if size.hidden_dropout else 0
    if size.layer_norm:
        return 2 * size.hidden * (_residual(load) + (0 if frozen else load.dtype_bytes) + masks)
    normalised = 0 if frozen else _residual(load)
    output = 0 if frozen else load.dtype_bytes
    return 2 * size.hidden * (MASTER + normalised + output)


def _attention(size: ModelSize, load: Workload) -> float:
    """Queries, keys and values as attention saves them, its output, and the scores where it is eager."""
    queries = size.heads * size.head_dim
    keys = size.key_value_heads * size.head_dim
    saved = (2 * queries + 2 * keys) * load.dtype_bytes
    if size.query_key_norm:
        saved += (queries + keys) * (MASTER + (0 if load.frozen else load.dtype_bytes))
    scores = size.heads * load.length * (MASTER + (load.dtype_bytes if load.dtype_bytes < MASTER else 0))
    if load.kind == "cpu" and size.attention_dropout:  # no CPU kernel drops out: torch keeps scores, mask and product
        scores = 3 * MASTER * size.heads * load.length
        return saved + scores
    return saved + (scores if load.eager else 0)


def _mlp(size: ModelSize, width: int, load: Workload) -> float:
    """Gated: gate, its activation, up and the product. Else: before and after the activation."""
    return (4 if size.gated else 2) * width * load.dtype_bytes


def _experts(size: ModelSize, load: Workload) -> float:
    """Each chosen expert's MLP with the token's copy in and its weighted output, and the router's logits."""
    each = _mlp(size, size.expert_intermediate, load) + 2 * size.hidden * load.dtype_bytes
    return size.experts_per_token * each + 2 * MASTER * size.experts


def _adapter(size: ModelSize, load: Workload) -> float:
    """Inputs of adapted layers, which each adapter casts to its own dtype, and the low-rank middles."""
    if load.adapter is None or not size.layers:
        return 0
    inputs = load.adapter.input_features if load.dtype_bytes < MASTER else 2 * size.hidden * size.layers
    return load.dtype_bytes * (inputs + load.adapter.rank_features) / size.layers
