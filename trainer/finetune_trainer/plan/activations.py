"""Memory of activations, of the loss and of generation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_trainer.plan.model_size import ModelSize
from finetune_trainer.plan.states import MASTER

if TYPE_CHECKING:
    from finetune_trainer.plan.memory import Workload

LOSS_TOKENS, LOSS_VOCAB = 4096, 32768
"""Tile of logits that TRL 1.16 computes at a time (`TOKEN_CHUNK_SIZE`, `_CHUNKED_LOGPROB_CHUNK_SIZE`)."""


def activation_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes that all layers save for the backward pass.

    The count follows Korthikanti et al. (arXiv 2205.05198, section 4), adapted to what the layers of transformers save:
    no dropout, grouped-query attention, gated MLPs, norms in float32. With gradient checkpointing (section 5) each
    layer saves its input, and one layer at a time has all of its activations.
    """
    tokens = load.batch * load.length
    layer = tokens * layer_activations(size, load)
    if load.checkpointing:
        return round(tokens * size.layers * size.hidden * _residual(load) + layer)
    return round(layer * size.layers + tokens * size.hidden * 2 * _residual(load))


def layer_activations(size: ModelSize, load: Workload) -> float:
    """Return the bytes per token that a layer saves for the backward pass, averaged over all layers."""
    dense_share = 1 - (size.expert_layers / size.layers if size.layers else 0)
    mlp = dense_share * _mlp(size, size.intermediate, load)
    if size.experts:
        mlp += (1 - dense_share) * _experts(size, load)
    return _norms(size, load) + _attention(size, load) + mlp + _adapter(size, load)


def loss_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes of the loss's working set.

    - Full logits: the logits in the dtype and in float32, their log-softmax and the gradient.
    - Tiles: one tile of logits, its float32 temporaries, and float32 gradients of the head (if trained) and of the
      hidden states.
    - One score per sequence: the gradients of the hidden states.
    """
    tokens = load.batch * load.length
    if load.no_logits:
        return MASTER * tokens * size.hidden
    if load.full_logits:
        return tokens * size.vocab * (12 if load.dtype_bytes == 4 else 14)
    rows = min(tokens, LOSS_TOKENS)
    tile = rows * (LOSS_VOCAB if load.kind == "cuda" else min(LOSS_VOCAB, size.vocab))
    temporaries = 0 if load.kind == "cuda" else 9 * MASTER  # Triton reduces in place; torch's were measured
    head = 0 if load.frozen else MASTER * size.head
    return tile * (load.dtype_bytes + temporaries) + head + MASTER * tokens * size.hidden


def drawing_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes that generation takes.

    These are the KV cache of every completion at its maximum length, the logits of its next token, and under ZeRO-3 the
    whole model, which is gathered for generation.
    """
    if not load.drawn:
        return 0
    cache = key_value_bytes(size, load.length, load.dtype_bytes)
    logits = size.vocab * (load.dtype_bytes + 2 * MASTER)
    whole = size.total * load.dtype_bytes if load.zero == 3 and load.quantized_bits is None else 0
    return load.drawn * (cache + logits) + whole


def key_value_bytes(size: ModelSize, length: int, dtype_bytes: int) -> int:
    """Return the bytes of the KV cache of one sequence of `length` tokens, in all layers."""
    return 2 * size.layers * size.key_value_heads * size.head_dim * dtype_bytes * length


def _mixed(load: Workload) -> bool:
    """Return whether autocast casts float32 weights, so that the residual stream is float32 too.

    Modules that are fully trained next to adapters return the dtype of the base.
    """
    trained = load.tuned_embeddings or not load.frozen
    return load.zero == 0 and trained and load.dtype_bytes < MASTER


def _residual(load: Workload) -> int:
    return MASTER if _mixed(load) else load.dtype_bytes


def _norms(size: ModelSize, load: Workload) -> float:
    """Return the bytes per token of two norms: the float32 input, and if trained the normalized input and output."""
    frozen = load.frozen
    masks = (load.dtype_bytes if load.kind == "cpu" else 1) if size.hidden_dropout else 0
    if size.layer_norm:
        return 2 * size.hidden * (_residual(load) + (0 if frozen else load.dtype_bytes) + masks)
    normalised = 0 if frozen else _residual(load)
    output = 0 if frozen else load.dtype_bytes
    return 2 * size.hidden * (MASTER + normalised + output)


def _attention(size: ModelSize, load: Workload) -> float:
    """Return the bytes per token of saved queries, keys, values and outputs, and of the scores of eager attention."""
    queries = size.heads * size.head_dim
    keys = size.key_value_heads * size.head_dim
    saved = (2 * queries + 2 * keys) * load.dtype_bytes
    if size.query_key_norm:
        saved += (queries + keys) * (MASTER + (0 if load.frozen else load.dtype_bytes))
    scores = size.heads * load.length * (MASTER + (load.dtype_bytes if load.dtype_bytes < MASTER else 0))
    if load.kind == "cpu" and size.attention_dropout:  # no CPU kernel with dropout: torch saves scores, mask, product
        scores = 3 * MASTER * size.heads * load.length
        return saved + scores
    return saved + (scores if load.eager else 0)


def _mlp(size: ModelSize, width: int, load: Workload) -> float:
    """Return the bytes per token of an MLP: 4 tensors if gated (gate, activation, up, product), else 2."""
    return (4 if size.gated else 2) * width * load.dtype_bytes


def _experts(size: ModelSize, load: Workload) -> float:
    """Return the bytes per token of the routed experts' MLPs and of the router's logits.

    An MLP includes its copy of the token, its weighted output and the low-rank activations of its adapters.
    """
    each = _mlp(size, size.expert_intermediate, load) + 2 * size.hidden * load.dtype_bytes
    if load.adapter is not None and size.expert_layers and not load.summed_stacks:
        each += load.dtype_bytes * load.adapter.stack_ranks / size.expert_layers
    return size.experts_per_token * each + 2 * MASTER * size.experts


def _adapter(size: ModelSize, load: Workload) -> float:
    """Return the bytes per token of the adapters' inputs, cast to the adapters' dtype, and of their low-rank outputs.

    In float32 there is no cast, so the adapters of an attention or a dense MLP share its input.
    """
    if load.adapter is None or not size.layers:
        return 0
    shared = size.hidden * (2 * size.layers - size.expert_layers)
    inputs = load.adapter.input_features if load.dtype_bytes < MASTER else shared
    return load.dtype_bytes * (inputs + load.adapter.rank_features) / size.layers
