"""Plans of published models compared with hand calculations, with every number as arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_api.runconfig import RunConfig
from finetune_trainer.plan import PlanContext, plan_job
from finetune_trainer.plan.devices import known_device
from finetune_trainer.plan.memory import Workload, estimate
from finetune_trainer.plan.model_size import adapter_size, meta_model, model_size
from finetune_trainer.plan.records import StagePlan

# The published config.json of Qwen/Qwen3-8B and Qwen/Qwen3-30B-A3B.
QWEN3_8B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip
MIB = 1 << 20
CONTEXT = 640 * MIB
# 24 channels in a ring and a tree, each connection with NCCL's three buffers.
NCCL = 2 * 24 * (4 * MIB + 120 * 640 * 8 * 8 + 8 * 512 * 8 * 16)


def planned(model: dict[str, Any], device: str = "H200", workers: int = 1, zero: Any = "auto", **sft: Any) -> StagePlan:
    """Return the plan of one packed stage."""
    data = {"sources": [{"inline": [{"text": "x"}]}]}
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "by-hand"},
        "spec": {
            "model": {"config": model},
            "stages": [{"sft": {"data": data, "packing": True, "perDeviceTrainBatchSize": 1} | sft}],
            "sharding": {"zero": zero},
        },
    }
    run = RunConfig.model_validate({"job": job, "root": "/tmp/x", "baseDir": "/tmp", "cacheDir": "/tmp/c"})
    found = known_device(device)
    assert found is not None
    [stage] = plan_job(run, PlanContext(found, workers=workers)).stages
    return stage


def shown(stage: StagePlan) -> dict[str, int]:
    """Return the nonzero parts of a plan; packed rows need no mask here."""
    return {name: count for name, count in stage.memory.parts().items() if count}


def lora(r: int, shapes: list[tuple[int, int]]) -> int:
    """Return the number of LoRA parameters on layers [in, out]."""
    return sum(r * inputs + r * outputs for inputs, outputs in shapes)


# Qwen3-8B: seven linear layers in each of 36 layers, adapters of rank 16.
LAYERS_8B = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 12288), (4096, 12288), (12288, 4096)]
LINEAR_8B = 36 * sum(inputs * outputs for inputs, outputs in LAYERS_8B)
TOTAL_8B = 2 * 151936 * 4096 + LINEAR_8B + 36 * (2 * 4096 + 2 * 128) + 4096  # embeddings and head, layers, norms
ADAPTER_8B = 36 * lora(16, LAYERS_8B)
# Bytes saved per token by one layer, in bfloat16 on a frozen base.
TOKEN_8B = (
    2 * 4096 * 4  # the inputs of two norms, in float32
    + (4096 + 1024 + 1024 + 4096) * 2  # queries, keys, values, the attention's output
    + (4096 + 1024) * 4  # the inputs of the norms on queries and keys, in float32
    + 4 * 12288 * 2  # gate, its activation, up, the product
    + (6 * 4096 + 12288) * 2  # inputs of the seven adapters, each with a copy
    + 7 * 16 * 2  # the adapters' outputs of rank 16
)


def test_qwen3_8b_lora_packed_at_8k() -> None:
    assert (TOTAL_8B, ADAPTER_8B) == (8_190_735_360, 43_646_976)
    stage = planned(QWEN3_8B, maxLength=8192, lora={})
    assert (stage.parameters, stage.trainable) == (TOTAL_8B + ADAPTER_8B, ADAPTER_8B)
    assert stage.zero == 0 and not stage.warnings
    hand = {
        "weights": 2 * TOTAL_8B + 4 * ADAPTER_8B,  # bfloat16, and float32 adapters
        "gradients": 4 * ADAPTER_8B,
        "optimizer": (4 + 4) * ADAPTER_8B,
        "activations": 8192 * (36 * TOKEN_8B + 2 * 4096 * 2),  # plus the last hidden states before and after the norm
        "loss": 4096 * 32768 * 2 + 8192 * 4096 * 4,  # one tile of logits, the float32 gradients of the hidden states
        "buffers": 2 * ADAPTER_8B,  # autocast's copy of the adapters
        "context": CONTEXT,
    }
    assert shown(stage) == hand
    assert stage.memory.total == sum(hand.values()) == pytest.approx(90.9e9, rel=1e-3)


def test_qwen3_8b_lora_packed_at_8k_with_checkpointing() -> None:
    """Each layer saves its input, and one layer at a time saves all of its activations."""
    stage = planned(QWEN3_8B, device="L40S", maxLength=8192, lora={}, gradientCheckpointing=True)
    assert stage.memory.activations == 8192 * (36 * 4096 * 2 + TOKEN_8B)
    assert stage.fits and stage.memory.total == pytest.approx(22.7e9, rel=5e-3)


def test_qwen3_8b_lora_on_eight_gpus() -> None:
    """ZeRO-2: sharded master weights and moments, two reduce buckets as large as the gradients, and NCCL."""
    stage = planned(QWEN3_8B, workers=8, zero=2, maxLength=8192, lora={}, gradientCheckpointing=True)
    share = ADAPTER_8B // 8
    bucket = 666 * 65536  # the least multiple of 65536 that is not smaller
    assert ADAPTER_8B % 8 == 0 and 665 * 65536 < ADAPTER_8B <= bucket
    found = stage.memory
    assert found.weights == 2 * (TOTAL_8B + ADAPTER_8B)
    assert (found.gradients, found.optimizer) == (2 * share, 12 * share)
    assert found.buffers == 2 * 2 * bucket + 4 * share
    assert (found.context, found.nccl) == (CONTEXT, NCCL) and pytest.approx(462e6, rel=1e-3) == NCCL


# Qwen3-30B-A3B: attention and 128 experts in each of 48 layers.
ATTENTION_30B = [(2048, 4096), (2048, 512), (2048, 512), (4096, 2048)]
STACKS_30B = [(2048, 2 * 768), (768, 2048)]  # gate_up_proj and down_proj of one expert
EXPERTS_30B = 48 * 128 * (2048 * 2 * 768 + 768 * 2048)
TOTAL_30B = (
    2 * 151936 * 2048  # embeddings and head
    + 48 * sum(inputs * outputs for inputs, outputs in ATTENTION_30B)
    + EXPERTS_30B
    + 48 * (128 * 2048 + 2 * 2048 + 2 * 128)  # routers, norms of layers, of queries and of keys
    + 2048
)
ON_ATTENTION = 48 * lora(16, ATTENTION_30B)
ON_EXPERTS = 48 * 128 * lora(16, STACKS_30B)
ADAPTER_30B = ON_ATTENTION + ON_EXPERTS
TOKEN_30B = (
    2 * 2048 * 4  # the inputs of two norms, in float32
    + (4096 + 512 + 512 + 4096) * 2  # queries, keys, values, the attention's output
    + (4096 + 512) * 4  # the inputs of the norms on queries and keys, in float32
    + 8 * (2048 + 4 * 768 + 2 * 16 + 2048) * 2  # 8 experts: the token, four of the MLP, two middles, the output
    + 2 * 128 * 4  # the router's logits and their softmax, in float32
    + (3 * 2048 + 4096) * 2  # inputs of the attention's four adapters, each with a copy
    + 4 * 16 * 2  # their outputs of rank 16
)


def test_qwen3_30b_a3b_lora() -> None:
    """LoRA on all layers is computed from its factors, so the plan has no sums with expert stacks."""
    assert (TOTAL_30B, EXPERTS_30B) == (30_532_122_624, 28_991_029_248)
    assert (ON_ATTENTION, ON_EXPERTS) == (13_369_344, 629_145_600)
    stage = planned(QWEN3_30B_A3B, maxLength=4096, lora={})
    assert (stage.parameters, stage.trainable) == (TOTAL_30B + ADAPTER_30B, ADAPTER_30B)
    hand = {
        "weights": 2 * TOTAL_30B + 4 * ADAPTER_30B,
        "gradients": 4 * ADAPTER_30B,
        "optimizer": (4 + 4) * ADAPTER_30B,
        "activations": 4096 * (48 * TOKEN_30B + 2 * 2048 * 2),
        "loss": 4096 * 32768 * 2 + 4096 * 2048 * 4,
        "buffers": 2 * ON_ATTENTION,  # autocast's copy of the adapters on linear layers
        "experts": 2 * ON_EXPERTS + 2 * ON_EXPERTS // 48,  # the factors in bfloat16, and one layer's gradients
        "context": CONTEXT,
    }
    assert shown(stage) == hand
    assert stage.memory.total == sum(hand.values()) == pytest.approx(111.1e9, rel=1e-3)
    assert "629 M of 643 M trained weights" in stage.warnings[0] and "esft" in stage.warnings[0]


def test_a_token_of_qwen3_30b_a3b_meets_8_of_128_adapted_experts() -> None:
    adapted = ON_ATTENTION + ON_EXPERTS * 8 // 128
    active = TOTAL_30B - EXPERTS_30B + EXPERTS_30B * 8 // 128 - 151936 * 2048  # the embedding is a lookup
    attention = 4 * 48 * 32 * 128 * 4096
    assert planned(QWEN3_30B_A3B, maxLength=4096, lora={}).flops_per_token == 4 * active + 3 * attention + 6 * adapted


@pytest.fixture(scope="module")
def qwen3_30b() -> tuple[Any, Workload]:
    """Return its size, and a workload with LoRA on all layers."""
    from transformers import AutoConfig

    from finetune_api.training import Lora

    config = AutoConfig.for_model(**QWEN3_30B_A3B)  # type: ignore[arg-type]
    adapter = adapter_size(meta_model(config), Lora())
    return model_size(meta_model(config)), Workload(batch=1, length=4096, adapter=adapter)


def test_sums_of_stacks_and_adapters_would_be_58_gb(qwen3_30b: tuple[Any, Workload]) -> None:
    """PEFT, still used for families without a grouped product, computes W + BA of every stack in bfloat16."""
    size, load = qwen3_30b
    sums = replace(load, summed_stacks=True)
    assert pytest.approx(58.0e9, rel=1e-3) == 2 * EXPERTS_30B
    assert estimate(size, sums).experts == 2 * EXPERTS_30B + 2 * EXPERTS_30B // 48
    assert estimate(size, replace(sums, checkpointing=True)).experts == 2 * (2 * EXPERTS_30B // 48)


def test_full_training_of_qwen3_30b_a3b(qwen3_30b: tuple[Any, Workload]) -> None:
    """ZeRO-0 casts every expert to bfloat16 in each pass; ZeRO-1 and above store them in bfloat16."""
    size, load = qwen3_30b
    full = replace(load, adapter=None)
    assert estimate(size, full).experts == 2 * EXPERTS_30B + 2 * EXPERTS_30B // 48
    assert estimate(size, full).buffers == 2 * (TOTAL_30B - EXPERTS_30B)
    assert estimate(size, replace(full, zero=1)).experts == 0
    forced = planned(QWEN3_30B_A3B, zero=0, maxLength=4096, gradientCheckpointing=True)
    assert "casts 54 GiB" in forced.warnings[0] and "sharding.zero to 1" in forced.warnings[0]
    assert forced.memory.experts == 2 * (2 * EXPERTS_30B // 48)


def test_zero_3_gathers_a_whole_layer() -> None:
    """In Qwen3-235B-A22B, ZeRO-3 gathers 128 experts of [4096, 1536] per layer, 2.4 billion weights, at once."""
    wide = QWEN3_30B_A3B | {"hidden_size": 4096, "moe_intermediate_size": 1536, "num_attention_heads": 64}
    stage = planned(wide, workers=16, zero=3, maxLength=4096, gradientCheckpointing=True)
    layer = 128 * 3 * 4096 * 1536 + 128 * 4096 + 4096 * (64 + 4 + 4) * 128 + 64 * 128 * 4096 + 2 * 4096 + 2 * 128
    share = -(-stage.trainable // 16)
    assert stage.memory.buffers == 4 * share + 2 * 500_000_000 + 2 * layer


def test_advice_for_a_mixture_that_does_not_fit() -> None:
    """The adapters on the experts fill an H100, so the plan advises which layers to adapt instead."""
    long = {"maxLength": 16384, "gradientCheckpointing": True, "lora": {"r": 32}}
    stage = planned(QWEN3_30B_A3B, device="H100", **long)
    assert not stage.fits
    assert "lora.targetModules to [k_proj, o_proj, q_proj, v_proj]" in stage.advice[0] and "fits" in stage.advice[0]


@pytest.mark.parametrize(("model", "zero"), [(QWEN3_8B, 0), (QWEN3_30B_A3B, 1)])
def test_full_training_of_a_mixture_prefers_zero_1(model: dict[str, Any], zero: int) -> None:
    """On one GPU too, where a dense model is trained without DeepSpeed."""
    small = {"num_hidden_layers": 2, "vocab_size": 1024}
    stage = planned(model | small, maxLength=1024)
    assert stage.fits and stage.zero == zero
    assert ("casts the experts" in stage.why) is (zero == 1) and not stage.warnings
