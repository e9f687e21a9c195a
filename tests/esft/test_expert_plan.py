"""The plan of an `esft` stage: the weights that it trains, compared with full fine-tuning and LoRA."""

from __future__ import annotations

from typing import Any

import pytest
from support.esft.expert_models import FAMILIES, FIELDS, batch, build

from finetune_api.runconfig import RunConfig
from finetune_api.stages import EsftSpec
from finetune_trainer.errors import UserError
from finetune_trainer.esft.families import expert_layers
from finetune_trainer.esft.scores import measure_scores
from finetune_trainer.esft.selection import ExpertConfig, select_layers
from finetune_trainer.esft.trainable import prepare
from finetune_trainer.plan import PlanContext, plan_job
from finetune_trainer.plan.devices import Device, known_device
from finetune_trainer.plan.experts import expert_plan
from finetune_trainer.plan.model_size import meta_model

DATA = {"sources": [{"inline": [{"messages": [{"role": "user", "content": "x"}]}]}]}
QWEN3_30B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960,
}  # fmt: skip


def spec(**fields: Any) -> EsftSpec:
    return EsftSpec.model_validate({"data": DATA} | fields)


def trained(model: Any, config: ExpertConfig) -> int:
    """Return the number of weights that have a gradient after the model is prepared."""
    prepare(model, config)
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("switches", [{}, {"trainSharedExperts": True}, {"trainNonExperts": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_given_by_hand_are_counted_exactly(family: str, switches: dict[str, bool]) -> None:
    model = build(family)
    layers = [layer.index for layer in expert_layers(model)]
    chosen = {str(index): [6, 1] for index in layers[:-1]}
    asked = spec(expertConfig={"experts": chosen}, **switches)
    if "trainSharedExperts" in switches and "deepseek" not in family and family not in ("qwen2_moe", "glm4_moe"):
        with pytest.raises(UserError, match=rf"stages\[0\]\.esft\.trainSharedExperts: {family} has no shared experts"):
            expert_plan(asked, meta_model(model.config), "stages[0].esft", "")
        return
    plan = expert_plan(asked, meta_model(model.config), "stages[0].esft", "")
    config = ExpertConfig(
        {int(index): tuple(ids) for index, ids in chosen.items()}, asked.train_shared_experts, asked.train_non_experts
    )
    assert plan.tuned == trained(model, config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_token_scores_never_select_more_than_was_planned(family: str, threshold: float) -> None:
    model = build(family)
    plan = expert_plan(spec(threshold=threshold), meta_model(model.config), "stages[0].esft", "")
    scores = measure_scores(model, [batch()])
    assert 0 < trained(model, ExpertConfig(select_layers(scores.token, threshold))) <= plan.tuned
    assert any("8 experts a layer" in note for note in plan.notes)


def test_an_expert_model_of_30_billion_weights() -> None:
    """Four of 128 experts per layer, by hand: 48 * 4 * 3 * 2048 * 768 weights, 12 bytes of AdamW each under ZeRO-1."""
    chosen = {str(layer): [0, 1, 2, 3] for layer in range(48)}
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "planned"},
        "spec": {
            "model": {"config": QWEN3_30B},
            "stages": [{"esft": {"data": DATA, "maxLength": 1024, "expertConfig": {"experts": chosen}}}],
            "sharding": {"zero": 1},
        },
    }
    run = RunConfig.model_validate({"job": job, "root": "/tmp/x", "baseDir": "/tmp", "cacheDir": "/tmp/c"})
    device = known_device("A100-80GB")
    assert device is not None
    (stage,) = plan_job(run, PlanContext(device)).stages
    assert stage.trainable == 48 * 4 * 3 * 2048 * 768
    esft, full, lora = stage.comparison
    assert [esft.method, full.method, lora.method] == ["ESFT", "full", "LoRA r=16"]
    assert esft.optimizer == 12 * stage.trainable and full.optimizer == 12 * stage.parameters
    assert stage.memory.total == esft.total < lora.total < full.total
    assert lora.trainable < esft.trainable < full.trainable
    assert "trains 192 of 6144 routed experts in 48 layers" in stage.notes


def test_a_dense_model_is_refused() -> None:
    dense = {name: value for name, value in FIELDS["olmoe"].items() if "expert" not in name}
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "planned"},
        "spec": {"model": {"config": {"model_type": "llama"} | dense}, "stages": [{"esft": {"data": DATA}}]},
    }
    run = RunConfig.model_validate({"job": job, "root": "/tmp/x", "baseDir": "/tmp", "cacheDir": "/tmp/c"})
    with pytest.raises(UserError, match=r"stages\[0\]\.esft: llama has no experts"):
        plan_job(run, PlanContext(Device("CPU", 8 << 30, "cpu")))
