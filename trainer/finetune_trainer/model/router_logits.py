"""Control which forward passes of a mixture of experts return router logits.

A model whose configuration sets `output_router_logits` computes its load-balancing loss in every forward pass, from
the router logits of the new tokens and the attention mask of all tokens. With a cache their lengths differ: generation
of a padded batch fails at the first cached token ("The size of tensor a (2) must match the size of tensor b (14)").
TRL's trainers set the field in the configuration and also pass it to each training forward pass, which is sufficient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FIELD = "output_router_logits"


def prepare_balance_loss(model: Any) -> None:
    """Change a model's configuration for TRL's balance loss.

    Router logits are switched off, so that the saved model generates in padded batches. `num_experts`, which TRL reads,
    becomes an alias of `num_local_experts` in families that have only the latter (GraniteMoE, PhiMoE), as in
    transformers' Mixtral.
    """
    for config in _configs(model):
        setattr(config, FIELD, False)
        if hasattr(config, "num_local_experts") and not hasattr(config, "num_experts"):
            names = type(config).attribute_map
            type(config).attribute_map = names | {"num_experts": names.get("num_local_experts", "num_local_experts")}


@contextmanager
def no_router_logits(model: Any) -> Iterator[None]:
    """Switch router logits off inside a `with` block, except for calls with `output_router_logits=True`.

    Args:
        model: a model of transformers, or a wrapper of PEFT, DDP or DeepSpeed around one.
    """
    before = [(config, getattr(config, FIELD)) for config in _configs(model)]
    for config, _ in before:
        setattr(config, FIELD, False)
    try:
        yield
    finally:
        for config, value in before:
            setattr(config, FIELD, value)


def _configs(model: Any) -> list[Any]:
    """Return the configurations from which a forward pass may read the field: the model's and its text model's.

    DDP's and DeepSpeed's wrappers hold the model as `module`; DeepSpeed's `config` is another kind of object.
    """
    while not hasattr(getattr(model, "config", None), "get_text_config"):
        model = model.module
    config = model.config
    found = {id(one): one for one in (config, config.get_text_config()) if hasattr(one, FIELD)}
    return list(found.values())
