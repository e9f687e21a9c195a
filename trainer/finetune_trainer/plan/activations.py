"""Memory of activations, of the loss and of drawing answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_trainer.plan.model_size import ModelSize
from finetune_trainer.plan.states import MASTER

if TYPE_CHECKING:
    from finetune_trainer.plan.memory import Workload

LOSS_TOKENS, LOSS_VOCAB = 4096, 32768
"""Tile in which TRL 1.16 computes logits (`TOKEN_CHUNK_SIZE`, `_CHUNKED_LOGPROB_CHUNK_SIZE`)."""


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


def drawing_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes that generating completions takes.

    These are keys and values of all layers for every completion at its maximum length, the logits of its next token, and
    under ZeRO-3 the whole model, which is gathered for generation.
    """
    if not load.drawn:
        return 0
    cache = key_value_bytes(size, load.length, load.dtype_bytes)
    logits = size.vocab * (load.dtype_bytes + 2 * MASTER)
    whole = size.total * load.dtype_bytes if load.zero == 3 and load.quantized_bits is None else 0
    return load.drawn * (cache + logits) + whole


def key_value_bytes(size: ModelSize, length: int, dtype_bytes: int) -> int:
    """Return the bytes of the keys and values of one sequence of `length` tokens, in all layers."""
    return 2 * size.layers * size.key_value_heads * size.head_dim * dtype_bytes * length


def _mixed(load: Workload) -> bool:
    """Whether float32 weights compute under autocast, so that the residual stream is float32 too.

    Modules that are trained in full next to adapters give their output in the base's format.
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
    """Return the bytes per token of the chosen experts' MLPs and of the router's logits.

    An MLP counts with its copy of the token, its weighted output and the low-rank activations of its adapters.
    """
    each = _mlp(size, size.expert_intermediate, load) + 2 * size.hidden * load.dtype_bytes
    if load.adapter is not None and size.expert_layers and not load.summed_stacks:
        each += load.dtype_bytes * load.adapter.stack_ranks / size.expert_layers
    return size.experts_per_token * each + 2 * MASTER * size.experts


def _adapter(size: ModelSize, load: Workload) -> float:
    """Inputs of adapted layers, which each adapter casts to its own dtype, and the low-rank middles.

    In float32 the inputs are shared: those of a layer's attention and of its dense MLP.
    """
    if load.adapter is None or not size.layers:
        return 0
    shared = size.hidden * (2 * size.layers - size.expert_layers)
    inputs = load.adapter.input_features if load.dtype_bytes < MASTER else shared
    return load.dtype_bytes * (inputs + load.adapter.rank_features) / size.layers
