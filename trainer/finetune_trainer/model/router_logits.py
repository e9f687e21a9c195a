"""Router logits of mixtures of experts: which calls of a model return them.

A model whose configuration sets `output_router_logits` computes its load-balancing loss in every forward pass, from
the router logits of the tokens at hand and the attention mask of all tokens. With a cache those differ in number:
generation of a padded batch fails at the first cached token ("The size of tensor a (2) must match the size of tensor b
(14)"). TRL's trainers set the switch in the configuration, and pass it to each forward pass of training as well, which
is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FIELD = "output_router_logits"


def fit_for_balance_loss(model: Any) -> None:
    """Fit a model's configuration to TRL's balance loss, for good.

    Router logits are switched off, so that the saved model generates in padded batches. `num_experts`, which TRL reads,
    becomes another name of `num_local_experts` in families that have only the latter (GraniteMoE, PhiMoE), as
    transformers itself names it in Mixtral.
    """
    for config in _configs(model):
        setattr(config, FIELD, False)
        if hasattr(config, "num_local_experts") and not hasattr(config, "num_experts"):
            names = type(config).attribute_map
            type(config).attribute_map = names | {"num_experts": names.get("num_local_experts", "num_local_experts")}


@contextmanager
def no_router_logits(model: Any) -> Iterator[None]:
    """Inside, a forward pass returns no router logits unless it is called with `output_router_logits=True`.

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
    """The configurations that a model's forward pass may read the switch from: its own, and its text model's.

    DDP's and DeepSpeed's wrappers hold the model as `module`; DeepSpeed's `config` is its own.
    """
    while not hasattr(getattr(model, "config", None), "get_text_config"):
        model = model.module
    config = model.config
    found = {id(one): one for one in (config, config.get_text_config()) if hasattr(one, FIELD)}
    return list(found.values())
