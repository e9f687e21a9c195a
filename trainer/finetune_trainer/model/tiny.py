"""Small configurations with the structure of a large one, so that a CPU can try in a second what a model does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

Fields = dict[str, Any]
VOCABULARY = 128
TOKENS: Fields = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LEAST_HEAD, LEAST_WIDTH = 8, 32
"""Smallest dimension of an attention head, even for rotary embeddings, and smallest width of the model."""
NARROW = 32
"""Width of the MLPs, which nothing else depends on."""
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
_SPAN = re.compile(r"window|chunk_size$|index_topk$|^index_block_size$|local_attention$")
_EVERY = re.compile(r"period|interval|offset|every|_step$|pattern$|first_k|start_index|num_dense_layers|group_size$")
_PLACES = re.compile(r"indices|idxs|layer_ids|_layers$")


def small_configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Configurations with the kinds of layers of `config` and ever more of its size: try one after the other.

    A family's fields depend on each other in ways that only its code knows, so a candidate may fail to build, or may
    lack a kind of layer. Widths are divided by one power of two, which keeps their ratios; numbers of heads, groups
    and experts stay; the first layers are kept, as many as show every kind.

    Args:
        config: of a text model, left as it is.
    """
    fields = config.to_dict()
    for widths in (_narrowed(fields), {}):
        for layers in (_shortened(fields, 1), _shortened(fields, 4), {}):
            small = _with(config, _spanned(fields) | widths | layers)
            if small is not None:
                yield small


def _with(config: PretrainedConfig, changed: Fields) -> PretrainedConfig | None:
    """The configuration with changed fields; None where the family's own checks refuse them."""
    fields = {name: value for name, value in config.to_dict().items() if not name.endswith("_token_id")}
    try:
        return type(config).from_dict(fields | TOKENS | changed)
    except Exception:  # each family has checks and errors of its own
        return None


def _spanned(fields: Fields) -> Fields:
    return {name: SPAN for name, value in fields.items() if _SPAN.search(name) and _number(value) > SPAN}


def _narrowed(fields: Fields) -> Fields:
    widths = {name: value for name, value in fields.items() if _is_width(name) and _number(value)}
    mlps = {name: NARROW for name, value in fields.items() if _MLP.search(name) and _number(value) > NARROW}
    factor = _factor(fields, widths)
    return mlps | {name: value // factor for name, value in widths.items()}


def _is_width(name: str) -> bool:
    return bool((_WIDTH.search(name) or _HEAD.search(name)) and not _MLP.search(name))


def _factor(fields: Fields, widths: dict[str, int]) -> int:
    """The largest power of two that divides every width and leaves heads and model wide enough."""
    hidden, heads = _first(fields, _HIDDEN), _first(fields, _HEADS)
    least = [value // LEAST_HEAD for name, value in widths.items() if _HEAD.search(name)]
    least += [hidden // heads // LEAST_HEAD] if heads else []
    limit = min([hidden // LEAST_WIDTH, *least])
    factor = 1
    while 2 * factor <= limit and all(value % (2 * factor) == 0 for value in widths.values()):
        factor *= 2
    return factor


def _shortened(fields: Fields, times: int) -> Fields:
    """As many of the first layers as show every kind of layer that the fields tell of, at least two, or a multiple."""
    total = _first(fields, _LAYERS)
    if not total:
        return {}
    lists = {name: value for name, value in fields.items() if isinstance(value, list) and value}
    places = {name: value for name, value in lists.items() if _PLACES.search(name) and _are_places(value, total)}
    kinds = {name: value for name, value in lists.items() if name not in places and _can_be_kinds(value, total)}
    needed = [2, *map(_until_all_seen, kinds.values()), *(min(value) + 1 for value in places.values())]
    needed += [value + 1 for name, value in fields.items() if _EVERY.search(name) and 0 < _number(value) < total]
    kept = min(total, times * max(needed))
    cut = {name: value[:kept] for name, value in kinds.items()}
    cut |= {name: [place for place in value if place < kept] for name, value in places.items()}
    return cut | {name: kept for name in _LAYERS if _number(fields.get(name)) == total}


def _are_places(values: list[Any], total: int) -> bool:
    """Whether a list can be numbers of layers: each at most once, in order."""
    return all(type(value) is int and 0 <= value < total for value in values) and sorted(set(values)) == values


def _can_be_kinds(values: list[Any], total: int) -> bool:
    """Whether a list can tell each layer's kind, or kinds that repeat."""
    return len(values) == total or (len(values) < total and all(isinstance(value, str) for value in values))


def _until_all_seen(values: list[Any]) -> int:
    """Length of the shortest beginning that holds every value of the list."""
    return 1 + max(values.index(value) for value in values)


def _first(fields: Fields, names: tuple[str, ...]) -> int:
    return next((_number(fields[name]) for name in names if _number(fields.get(name))), 0)


def _number(value: Any) -> int:
    """The value of a field that is a positive whole number, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
