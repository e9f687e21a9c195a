"""Every composite family of transformers either trains on text and is saved losslessly, or is rejected by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.jobs.composite_models import SPECIAL, build, config_of
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from trl.trainer.utils import add_fused_lm_head

from finetune_trainer.errors import UserError
from finetune_trainer.model.composite import AutoLanguageModel, AutoScoringModel, language_names
from finetune_trainer.model.composite_families import POSITION_ROWS, REFUSED, TRAINED, is_composite
from finetune_trainer.model.composite_result import complete_result, merge_into_base
from finetune_trainer.plan.model_size import meta_model

WITHOUT_GRADIENT = "e_score_correction_bias"
"""A router bias that gets no gradient, in composite and in text-only families alike."""
CLOSE = 1e-5
SOON = {
    "chameleon", "ernie4_5_vl_moe", "gemma3", "gemma4", "glm4v_moe", "idefics3", "internvl", "llava", "mistral3",
    "mllama", "molmo2", "phi4_multimodal", "qwen2_5_vl", "qwen2_audio", "qwen3_5", "qwen3_vl_moe",
}  # fmt: skip
"""One family for each structure; the others take a second each and run with the long tests."""


def _families() -> list[Any]:
    return [pytest.param(name, marks=() if name in SOON else pytest.mark.long) for name in sorted(TRAINED)]


@pytest.mark.parametrize("family", _families())
def test_the_language_model_alone_trains_and_the_rest_is_written_back(family: str, tmp_path: Path) -> None:
    model = build(family, auto=AutoLanguageModel).train()
    ids = _tokens()
    loss = _own_loss(model, ids)
    _check_gradients(model, loss)
    _check_causal(model, ids)
    _check_fused_loss(model, ids, loss.item())
    _check_frozen_unused(model, ids)
    _check_written_back(family, tmp_path)


@pytest.mark.parametrize("family", sorted(set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES) - TRAINED))
def test_other_families_are_refused_by_name(family: str) -> None:
    config = _default(family)
    for task in ("causal", "reward"):
        with pytest.raises(UserError) as caught:
            meta_model(config, task)
        (problem,) = caught.value.problems
        assert problem.path == "model" and problem.message.startswith(f"{family} is a composite model (")
        assert REFUSED.get(family, "has not been tried") in problem.message


@pytest.mark.parametrize("family", sorted(POSITION_ROWS))
def test_packed_documents_do_not_see_each_other(family: str) -> None:
    model = build(family, auto=AutoLanguageModel).train()
    ids, positions = _tokens(1), torch.arange(6).repeat(2)[None]
    together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = model(input_ids=ids[:, 6:], position_ids=positions[:, 6:], use_cache=False).logits
    assert torch.allclose(together[:, 6:], alone, atol=CLOSE)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_a_model_that_scores_keeps_all_parts(family: str) -> None:
    model = build(family, auto=AutoScoringModel)
    inside = language_names(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert "score.weight" in trained and trained == {name for name, _ in model.named_parameters() if inside(name)}
    assert any("vis" in name for name, _ in model.named_parameters() if not inside(name))


def test_a_family_without_a_class_that_scores_is_refused() -> None:
    with pytest.raises(UserError, match=r"llava is a composite model .* no class of it that scores texts"):
        meta_model(config_of("llava"), "reward")


@pytest.mark.parametrize(
    ("family", "architecture", "composite"),
    [
        ("gemma3_text", "Gemma3ForCausalLM", False),
        ("qwen3_5_text", "Qwen3_5ForCausalLM", False),
        ("qwen3_5", "Qwen3_5ForCausalLM", False),  # a language model saved with the composite configuration
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", True),
        ("qwen3_5", None, True),
        ("gemma3", None, True),
        ("fuyu", "FuyuForCausalLM", True),
        ("llama", "LlamaForCausalLM", False),
        ("dbrx", "DbrxForCausalLM", False),
    ],
)
def test_what_is_composite(family: str, architecture: str | None, composite: bool) -> None:
    config = _default(family)
    config.architectures = None if architecture is None else [architecture]
    assert is_composite(config) is composite


def _default(family: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[family]()


def _tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(8, SPECIAL - 20, (rows, 12), generator=torch.Generator().manual_seed(1))


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return found


def _own_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the family's own loss, without the load-balancing loss of experts."""
    model.config.get_text_config().output_router_logits = False
    loss: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
    return loss


def _check_gradients(model: Any, loss: torch.Tensor) -> None:
    """Every weight that requires a gradient gets one, otherwise distributed training hangs."""
    loss.backward()
    inside = language_names(model)
    for name, weight in model.named_parameters():
        assert weight.requires_grad is inside(name) or name.endswith(WITHOUT_GRADIENT), name
        assert (weight.grad is not None) is weight.requires_grad or name.endswith(WITHOUT_GRADIENT), name
    model.zero_grad()


def _check_causal(model: Any, ids: torch.Tensor) -> None:
    """No token attends to a later one, and in particular not to its own label."""
    changed = ids.clone()
    changed[:, -1] = 7
    difference = (_logits(model, ids) - _logits(model, changed)).abs()
    assert difference[:, :-1].max() < CLOSE < difference[:, -1].max()


def _check_fused_loss(model: Any, ids: torch.Tensor, own: float) -> None:
    """TRL's fused loss, which does not build the logits, equals the family's own."""
    add_fused_lm_head(model)
    fused = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True).loss
    del model.forward
    assert fused.item() == pytest.approx(own, abs=1e-4)


def _check_frozen_unused(model: Any, ids: torch.Tensor) -> None:
    before, inside = _logits(model, ids), language_names(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not inside(name):
                weight.add_(1.0)
    assert torch.equal(_logits(model, ids), before)


def _check_written_back(family: str, directory: Path) -> None:
    """A base with frozen float32 parts that is loaded in bfloat16 is saved without loss of precision."""
    build(family).save_pretrained(directory / "base")
    trained = AutoLanguageModel.from_pretrained(str(directory / "base"), dtype=torch.bfloat16)
    inside = language_names(trained)
    state = {
        name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in trained.state_dict().items()
    }
    whole = merge_into_base(str(directory / "base"), None, trained, state, AutoLanguageModel)
    whole.save_pretrained(directory / "result")
    complete_result(directory / "result", str(directory / "base"), None, AutoLanguageModel)

    loaded, info = AutoModelForMultimodalLM.from_pretrained(directory / "result", output_loading_info=True)
    assert not any(info.values()), info
    assert _names(directory / "result") == _names(directory / "base")
    base = AutoModelForMultimodalLM.from_pretrained(directory / "base").state_dict()
    for name, tensor in loaded.state_dict().items():
        expected = state[name].float() if inside(name) else base[name]
        assert torch.equal(tensor, expected), name


def _names(directory: Path) -> set[str]:
    return set(load_file(directory / "model.safetensors"))
