"""Causal batches that are padded on the right have the same loss and gradients without the attention mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.packing import packed_models
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_trainer.esft.routing import RoutingCounter
from finetune_trainer.model.document_masks import decoder_of
from finetune_trainer.model.reward_score import read_at_last_token
from finetune_trainer.model.right_padding import drop_right_padding, is_causal
from finetune_trainer.preflight.packing import Trial

EXACT = 1e-5
LENGTHS = (20, 13, 5)
FAMILIES = ["llama", "qwen3", "gemma3_text", "qwen3_moe", "gpt2", "opt", "lfm2", "qwen3_5_text", "falcon_h1"]


def batch(left: bool = False, vocab: int = packed_models.VOCAB) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(vocab // 4, vocab // 2, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def given_masks(model: Any) -> list[Tensor | None]:
    """Return a list that records the decoder's masks in later calls, after all currently registered hooks."""
    seen: list[Tensor | None] = []

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs.get("attention_mask"))

    decoder_of(model).register_forward_pre_hook(see, with_kwargs=True)
    return seen


def loss_and_gradients(model: Any, **more: Any) -> tuple[float, Tensor]:
    model.zero_grad()
    loss = model(**batch(), use_cache=False, **more).loss
    loss.backward()
    grads = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return float(loss.detach()), torch.cat(grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_loss_and_gradients(family: str) -> None:
    """This covers full, windowed, latent and linear attention, convolutions, learned positions and the balance loss."""
    model = packed_models.build(family)
    more = {"output_router_logits": True} if "moe" in family else {}
    expected, gradients = loss_and_gradients(model, **more)
    assert drop_right_padding(model) is not None
    seen = given_masks(model)
    found, others = loss_and_gradients(model, **more)
    assert seen == [None]
    assert found == pytest.approx(expected, abs=EXACT)
    assert torch.allclose(others, gradients, atol=EXACT * float(gradients.abs().max()))


def test_masks_that_are_needed_stay() -> None:
    """Masks are kept for padding on the left, packed rows with positions, and generation with a cache."""
    model = packed_models.build("llama")
    drop_right_padding(model)
    seen = given_masks(model)
    left, right = batch(left=True), batch()
    model(**left, use_cache=False)
    model(**right, use_cache=False, position_ids=torch.arange(max(LENGTHS)).expand(len(LENGTHS), -1))
    model(**right, use_cache=True)
    expected = (left["attention_mask"], right["attention_mask"], right["attention_mask"])
    assert len(seen) == 3
    for one, other in zip(seen, expected, strict=True):
        assert one is not None and torch.equal(one, other)


@torch.no_grad()
def test_load_statistics_leave_padding_out() -> None:
    """The counter sees the mask, whether it is attached before or after the hook that drops the mask."""
    counts = []
    for first in (True, False):
        model = packed_models.build("qwen3_moe")
        counter = RoutingCounter(model)
        if first:
            counter.attach()
        drop_right_padding(model)
        if not first:
            counter.attach()
        model(**batch(), use_cache=False)
        counts.append([int(layer.counts.sum()) for layer in counter.layers.values()])
    chosen = model.config.num_experts_per_tok * sum(LENGTHS)
    assert counts == [[chosen] * model.config.num_hidden_layers] * 2


@torch.no_grad()
def test_rewards_are_read_at_the_last_token() -> None:
    config = AutoConfig.for_model("llama", **packed_models.FIELDS["llama"], num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    read_at_last_token(model)
    given = {name: value for name, value in batch().items() if name != "labels"}
    expected = model(**given).logits
    drop_right_padding(model)
    seen = given_masks(model)
    assert torch.allclose(model(**given).logits, expected, atol=EXACT) and seen == [None]


def test_encoders_keep_their_masks() -> None:
    fields = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("bert", **fields, intermediate_size=32, num_labels=1)
    for auto in (AutoModelForMaskedLM, AutoModelForSequenceClassification):
        assert drop_right_padding(auto.from_config(config)) is None
    both_ways = packed_models.build("llama")
    both_ways.config.is_causal = False
    assert drop_right_padding(both_ways) is None


@pytest.mark.long
@pytest.mark.timeout(7200)
@torch.no_grad()
def test_every_causal_family() -> None:
    """Small models of default configurations that count as causal have the same outputs without the mask."""
    wrong: dict[str, float] = {}
    tried = 0
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model = _small(family)
        if model is None or not is_causal(model):
            continue
        tried += 1
        given = {**batch(vocab=model.config.get_text_config().vocab_size), "use_cache": False}
        kept = given["attention_mask"].bool()
        given.pop("labels")
        expected = model(**given).logits[kept]
        drop_right_padding(model)
        apart = float((model(**given).logits[kept] - expected).abs().max() / expected.std())
        if not apart < 1e-4:
            wrong[family] = apart
    assert tried > 100 and not wrong


def _small(family: str) -> Any:
    try:
        config = AutoConfig.for_model(family).get_text_config()
    except Exception:  # a few families have no default configuration
        return None
    model = Trial(config, "auto", 2, "cpu")._model()
    return None if model is None else model.eval()
