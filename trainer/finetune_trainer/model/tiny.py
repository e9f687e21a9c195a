"""Make small configurations with the structure of a large one, so that a CPU can test a model's behavior quickly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

Fields = dict[str, Any]
VOCABULARY = 128
TOKENS: Fields = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MIN_HEAD_DIM, MIN_WIDTH = 8, 32
"""Minimum dimension of an attention head (even, for rotary embeddings) and minimum hidden size."""
MLP_WIDTH = 32
"""Width of the MLPs; no other field depends on it."""
SPAN = 8
"""Tokens in a sliding window, a chunk or a selection of keys."""

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_MLP = re.compile(r"intermediate|ffn|n_inner|dff|feed_forward|^dim_ff$")
_HEAD = re.compile(r"head_dim$|^d_head$|_d_head$|headdim$|^rotary_dim$|head_size$|^kv_channels$|^dim_head$")
_WIDTH = re.compile(
    r"(hidden_size|n_embd|d_model|_rank|_d_ssm|lru_width|embedding_size|embed_dim|embedding_dim|proj_dim)(_|$)"
)
_SPANS = re.compile(r"window|chunk_size$|index_topk$|^index_block_size$|local_attention$")
_INTERVALS = re.compile(
    r"period|interval|offset|every|_step$|pattern$|first_k|start_index|num_dense_layers|group_size$"
)
_LAYER_INDICES = re.compile(r"indices|idxs|layer_ids|_layers$")


def small_configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield configurations with the kinds of layers of `config`, from the smallest to the largest: try each in turn.

    A family's fields depend on each other in ways that only its code defines, so a candidate may fail to build or may
    lack a kind of layer. Widths are divided by one power of two, which keeps their ratios. Numbers of heads, groups and
    experts do not change. Only the first layers are kept, enough to have every kind.

    Args:
        config: of a text model; it is not changed.
    """
    fields = config.to_dict()
    for widths in (_reduced_widths(fields), {}):
        for layers in (_reduced_layers(fields, 1), _reduced_layers(fields, 4), {}):
            small = _with(config, _reduced_spans(fields) | widths | layers)
            if small is not None:
                yield small


def _with(config: PretrainedConfig, changed: Fields) -> PretrainedConfig | None:
    """Return the configuration with changed fields; None where the family's own checks refuse them."""
    fields = {name: value for name, value in config.to_dict().items() if not name.endswith("_token_id")}
    try:
        return type(config).from_dict(fields | TOKENS | changed)
    except Exception:  # families raise errors of many types
        return None


def _reduced_spans(fields: Fields) -> Fields:
    return {name: SPAN for name, value in fields.items() if _SPANS.search(name) and _positive(value) > SPAN}


def _reduced_widths(fields: Fields) -> Fields:
    widths = {name: value for name, value in fields.items() if _is_width(name) and _positive(value)}
    mlps = {name: MLP_WIDTH for name, value in fields.items() if _MLP.search(name) and _positive(value) > MLP_WIDTH}
    factor = _factor(fields, widths)
    return mlps | {name: value // factor for name, value in widths.items()}


def _is_width(name: str) -> bool:
    return bool((_WIDTH.search(name) or _HEAD.search(name)) and not _MLP.search(name))


def _factor(fields: Fields, widths: dict[str, int]) -> int:
    """Return the largest power of two that divides every width and keeps the minimum sizes."""
    hidden, heads = _first(fields, _HIDDEN), _first(fields, _HEADS)
    least = [value // MIN_HEAD_DIM for name, value in widths.items() if _HEAD.search(name)]
    least += [hidden // heads // MIN_HEAD_DIM] if heads else []
    limit = min([hidden // MIN_WIDTH, *least])
    factor = 1
    while 2 * factor <= limit and all(value % (2 * factor) == 0 for value in widths.values()):
        factor *= 2
    return factor


def _reduced_layers(fields: Fields, times: int) -> Fields:
    """Return fields that keep the first layers: `times` as many as have every kind, at least 2."""
    total = _first(fields, _LAYERS)
    if not total:
        return {}
    lists = {name: value for name, value in fields.items() if isinstance(value, list) and value}
    indices = {
        name: value for name, value in lists.items() if _LAYER_INDICES.search(name) and _are_layer_indices(value, total)
    }
    kinds = {name: value for name, value in lists.items() if name not in indices and _are_layer_kinds(value, total)}
    needed = [2, *map(_prefix_with_all, kinds.values()), *(min(value) + 1 for value in indices.values())]
    needed += [value + 1 for name, value in fields.items() if _INTERVALS.search(name) and 0 < _positive(value) < total]
    kept = min(total, times * max(needed))
    cut = {name: value[:kept] for name, value in kinds.items()}
    cut |= {name: [index for index in value if index < kept] for name, value in indices.items()}
    return cut | {name: kept for name in _LAYERS if _positive(fields.get(name)) == total}


def _are_layer_indices(values: list[Any], total: int) -> bool:
    """Return whether a list can be indices of layers: each at most once, in order."""
    return all(type(value) is int and 0 <= value < total for value in values) and sorted(set(values)) == values


def _are_layer_kinds(values: list[Any], total: int) -> bool:
    """Return whether a list can hold each layer's kind, or a repeating pattern of kinds."""
    return len(values) == total or (len(values) < total and all(isinstance(value, str) for value in values))


def _prefix_with_all(values: list[Any]) -> int:
    """Return the length of the shortest prefix that has every value of the list."""
    return 1 + max(values.index(value) for value in values)


def _first(fields: Fields, names: tuple[str, ...]) -> int:
    return next((_positive(fields[name]) for name in names if _positive(fields.get(name))), 0)


def _positive(value: Any) -> int:
    """Return the value of a field if it is a positive integer, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
