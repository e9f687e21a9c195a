"""What attention gets for packed rows: each document's bounds and no mask, with flash attention and sdpa."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.packing import packed_models
from support.packing.flash_stand_in import FlashStandIn, with_flash
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from finetune_trainer.data import PackedCollator
from finetune_trainer.model import document_attention
from finetune_trainer.model.document_attention import as_mask, attend
from finetune_trainer.model.document_masks import Form, documents_separated
from finetune_trainer.training.packing_probe import Probe, log_probs

LENGTH = 32
ROWS = ([11, 9, 4], [32], [17, 3])
"""Document lengths of three packed rows; the second row has no padding."""
BOUNDS = [0, 11, 20, 24, 32, 64, 81, 84, 96]
"""Start positions of the documents and of the padding in the concatenated rows."""
EXACT = 1e-5


def batch(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    packed = []
    for lengths in ROWS[:rows]:
        ids = torch.randint(3, packed_models.VOCAB, (sum(lengths),), generator=generator).tolist()
        packed.append({"input_ids": ids, "labels": ids, "seq_lengths": lengths})
    return PackedCollator(0, LENGTH, padding_mask=True)(packed)


def logits_alone(model: Any, rows: int) -> list[Tensor]:
    """Return the logits [length, vocabulary] of each document in a row of its own, in order."""
    found = []
    for ids, lengths in zip(batch(rows)["input_ids"], ROWS, strict=False):
        found += [model(input_ids=one[None], use_cache=False).logits[0] for one in ids[: sum(lengths)].split(lengths)]
    return found


def logits_packed(model: Any, rows: int) -> list[Tensor]:
    """Return the same logits from packed rows."""
    given = batch(rows)
    given.pop("labels")
    whole = model(**given, use_cache=False).logits
    assert whole.shape[:2] == (rows, LENGTH)
    found: list[Tensor] = []
    for row, lengths in zip(whole, ROWS, strict=False):
        found += row[: sum(lengths)].split(lengths)
    return found


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=EXACT * float(other.std()) * 10)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
@torch.no_grad()
def test_flash_attention_gets_every_document(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_models.build(family)
    expected = logits_alone(model, rows)
    stand_in = FlashStandIn(monkeypatch)
    with_flash(model)
    assert Probe(model, min(rows, 2), torch.float32).find().form == Form.BOUNDS
    stand_in.bounds.clear()
    stand_in.whole.clear()
    with documents_separated(model, Form.BOUNDS):
        assert_same(logits_packed(model, rows), expected)
    assert stand_in.bounds == [[one for one in BOUNDS if one <= rows * LENGTH]] * model.config.num_hidden_layers
    assert not stand_in.whole


@torch.no_grad()
def test_flash_attention_without_bounds_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that passes neither bounds nor positions to flash attention is rejected."""
    model = packed_models.build("llama")
    FlashStandIn(monkeypatch)
    with_flash(model)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(_without_bounds, with_kwargs=True)
    finding = Probe(model, 2, torch.float32).find()
    assert finding.form is None and finding.reason.startswith("LlamaAttention")


def _without_bounds(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    names = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return args, {name: value for name, value in kwargs.items() if name not in names}


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Record the mask of each call of torch's attention."""
    seen: list[Tensor | None] = []
    torchs = nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs.get("attn_mask"))
        return torchs(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "deepseek_v3"])
def test_sdpa_gets_no_mask(family: str, checkpointing: bool, masks: list[Tensor | None]) -> None:
    """Sdpa computes each document in a causal call of its own, with the loss and gradients of the document alone."""
    model = packed_models.build(family).train()
    for module in model.modules():  # gpt2 has dropout by default
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attn_pdrop = 0.0
    if checkpointing:
        model.gradient_checkpointing_enable()
    losses, gradients = [], []
    for form in (None, Form.BOUNDS):
        model.zero_grad()
        masks.clear()
        loss = packed_models.loss_alone(model) if form is None else packed_models.loss_packed(model, form)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None]))
    assert len(masks) >= 4 * model.config.num_hidden_layers and all(mask is None for mask in masks)
    assert losses[1] == pytest.approx(losses[0], abs=EXACT)
    assert torch.allclose(gradients[1], gradients[0], atol=EXACT * float(gradients[0].abs().max()))


@torch.no_grad()
def test_experts_see_the_batch_as_it_was() -> None:
    """The load-balancing loss and its router logits equal those of rows with masks, without the padding."""
    model = packed_models.build("qwen3_moe")
    found = []
    for form in (Form.POSITIONS, Form.BOUNDS):
        with documents_separated(model, form):
            found.append(model(**batch(3), use_cache=False, output_router_logits=True))
    assert float(found[1].aux_loss) == pytest.approx(float(found[0].aux_loss), abs=EXACT)
    assert float(found[1].loss) == pytest.approx(float(found[0].loss), abs=EXACT)


@pytest.mark.parametrize("window", [None, 5, 64])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attend_is_attention_with_a_mask(window: int | None, heads: int, scaling: float | None) -> None:
    """Outputs and gradients equal those of transformers' function with a mask of documents and windows."""
    bounds = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
    places = torch.arange(24)
    document = torch.bucketize(places, bounds, right=True)
    back = places[:, None] - places
    mask = (back >= 0) & (back < (window or 24)) & (document[:, None] == document)
    module = attention(groups=4 // heads)
    found = []
    for given in (mask[None, None], as_mask(bounds)):
        generator = torch.Generator().manual_seed(0)
        states = [torch.randn(1, count, 24, 8, generator=generator).requires_grad_() for count in (4, heads, heads)]
        out, _ = attend(module, *states, given, scaling=scaling, sliding_window=window)
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
        found.append([out, *(one.grad for one in states)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=EXACT)


def attention(groups: int = 1, causal: bool = True, **config: Any) -> nn.Module:
    """Return a module with the attributes that the attention function reads."""
    module = nn.Module()
    module.num_key_value_groups, module.is_causal, module.layer_idx = groups, causal, 0  # type: ignore[assignment]
    module.config = SimpleNamespace(**config)  # type: ignore[assignment]
    return module


def test_other_masks_are_transformers_own() -> None:
    states = [torch.randn(2, 4, 6, 8) for _ in range(3)]
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    for given in (None, mask):
        found, expected = (one(attention(), *states, given)[0] for one in (attend, sdpa_attention_forward))
        assert torch.equal(found, expected)


def test_dropout_reaches_each_document(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def record(*args: Any, dropout_p: float, **kwargs: Any) -> Tensor:
        seen.append(dropout_p)
        return args[0]

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record)
    states = [torch.randn(1, 4, 6, 8) for _ in range(3)]
    attend(attention(), *states, as_mask(torch.tensor([0, 2, 6], dtype=torch.int32)), dropout=0.25)
    assert seen == [0.25, 0.25]


@pytest.mark.parametrize(
    ("module", "kwargs"),
    [
        (attention(layer_types=["sliding_attention"], sliding_window=4), {}),
        (attention(sliding_window=4), {}),
        (attention(layer_types=["chunked_attention"], attention_chunk_size=4), {"sliding_window": None}),
        (attention(), {"softcap": 30.0}),
        (attention(), {"s_aux": torch.zeros(4)}),
        (attention(causal=False), {}),
    ],
    ids=["window not passed on", "window of all layers", "chunks", "softcap", "sinks", "not causal"],
)
def test_what_it_does_not_know_is_refused(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """The probe then tries the forms with masks."""
    states = [torch.randn(1, 4, 6, 8) for _ in range(3)]
    with pytest.raises(NotImplementedError):
        attend(module, *states, as_mask(torch.tensor([0, 2, 6], dtype=torch.int32)), **kwargs)


@torch.no_grad()
def test_a_family_that_keeps_its_window_to_itself_is_packed_by_masks() -> None:
    model = packed_models.build("mistral")
    for layer in model.model.layers:
        layer.self_attn.config = SimpleNamespace(**{**vars(model.config), "_attn_implementation": "sdpa"})
        layer.self_attn.config.sliding_window = None
        layer.self_attn.config.layer_types = ["sliding_attention"] * 2
    assert Probe(model, 2, torch.float32).find().form == Form.POSITIONS


def test_torchs_kernel_gets_bounds_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function with the signature of torch's variable-length kernel, which needs a GPU, records its arguments."""
    stand_in, module = FlashStandIn(monkeypatch), attention(groups=2)
    calls: list[dict[str, Any]] = []

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
        *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        calls.append({"window": window_size, "longest": (max_q, max_k), "gqa": enable_gqa})
        return stand_in.varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, 0.0, scale, True, window_size)

    states = [torch.randn(1, count, 12, 8) for count in (4, 2, 2)]
    bounds = as_mask(torch.tensor([0, 7, 12], dtype=torch.int32))
    expected = {window: attend(module, *states, bounds, sliding_window=window)[0] for window in (None, 3)}
    monkeypatch.setattr(document_attention, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(document_attention, "varlen_attn", varlen_attn)
    for window, wanted in expected.items():
        found, _ = attend(module, *states, bounds, sliding_window=window)
        assert torch.allclose(found, wanted, atol=EXACT)
    assert calls == [{"window": (before, 0), "longest": (7, 7), "gqa": True} for before in (-1, 2)]


@torch.no_grad()
def test_bounds_hold_in_the_trainers_own_call() -> None:
    """TRL's fused head calls the backbone itself."""
    from trl.trainer.utils import add_fused_lm_head

    model = packed_models.build("qwen3")
    add_fused_lm_head(model)
    given = batch(3)
    found = []
    for form in (Form.POSITIONS, Form.BOUNDS):
        with documents_separated(model, form):
            found.append(log_probs(model, given))
    assert torch.allclose(*found, atol=EXACT)
