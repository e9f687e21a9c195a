"""The plan's attention masks: which layers get one, and their bytes, by hand and as torch saves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.plan.tiny_models import FIELDS, IDS, SHAPE, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from finetune_api.runconfig import RunConfig
from finetune_trainer.plan import PlanContext, plan_job
from finetune_trainer.plan.attention_masks import MaskedLayers, mask_bytes
from finetune_trainer.plan.devices import Device, known_device

DATA = {"sources": [{"inline": [{"text": "x"}]}]}
LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "dtype": "bfloat16",
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip
GEMMA = {"model_type": "gemma3_text", "dtype": "bfloat16"} | SHAPE | IDS | {
    "num_hidden_layers": 6, "sliding_window": 1024, "max_position_embeddings": 32768,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
}  # fmt: skip
LLAMA4 = {"model_type": "llama4_text", "dtype": "bfloat16"} | SHAPE | IDS | {
    "attention_chunk_size": 2048, "no_rope_layers": [1, 0], "num_local_experts": 2, "max_position_embeddings": 32768,
}  # fmt: skip
GPU = known_device("H100") or Device("", 0, "")
CPU = Device("CPU", 8 << 30, "cpu")
LONG = {"maxLength": 8192, "perDeviceTrainBatchSize": 8}
PAIRS = 8 * 8192**2
"""Token pairs in a batch of `LONG`."""


def masks(kind: str, model: dict[str, Any], device: Device = GPU, attention: str = "auto", **fields: Any) -> int:
    """Return the planned bytes of attention masks of a job's only stage."""
    return planned(kind, model, device, attention, **fields).stages[0].memory.attention_masks


def planned(kind: str, model: dict[str, Any], device: Device = GPU, attention: str = "auto", **fields: Any) -> Any:
    stage = {kind: {"data": DATA} | fields}
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "planned"},
        "spec": {"model": {"config": model, "attnImplementation": attention}, "stages": [stage]},
    }
    run = RunConfig.model_validate({"job": job, "root": "/tmp/x", "baseDir": "/tmp", "cacheDir": "/tmp/c"})
    return plan_job(run, PlanContext(device))


def test_by_hand() -> None:
    """L = 8192, B = 8, 32 layers in bfloat16: 34 GB of biases and 0.5 GB of mask, or one layer's with checkpointing."""
    masked = MaskedLayers(layers=32, kinds=1)
    assert mask_bytes(masked, 8, 8192, 2, checkpointing=False) == 34_359_738_368 + 536_870_912
    assert mask_bytes(masked, 8, 8192, 2, checkpointing=True) == 1_073_741_824 + 536_870_912
    assert mask_bytes(MaskedLayers(), 8, 8192, 2, checkpointing=False) == 0


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_none_where_rows_are_padded_on_the_right(kind: str) -> None:
    assert masks(kind, LLAMA_8B, **LONG) == 0


@pytest.mark.parametrize("attention", ["auto", "flash_attention_2"])
def test_none_for_packed_rows(attention: str) -> None:
    assert masks("sft", LLAMA_8B, attention=attention, packing=True, **LONG) == 0


def test_prompts_are_padded_in_front() -> None:
    answers = {"generation": {"maxNewTokens": 4096}, "maxPromptLength": 4096, "numGenerations": 2, "beta": 0.0}
    fields = {"rewards": [{"function": "rewards:score"}], "perDeviceTrainBatchSize": 4, "gradientCheckpointing": False}
    assert masks("rlhf", LLAMA_8B, **answers, **fields) == PAIRS * (1 + 32 * 2)
    assert masks("rlhf", LLAMA_8B, **answers, **fields | {"gradientCheckpointing": True}) == PAIRS * (1 + 2)


def test_windows_are_masks() -> None:
    """Five of six layers have a window of 1024 tokens; torch's variable-length kernel on a GPU needs no mask for it."""
    assert masks("sft", GEMMA, **LONG) == PAIRS * (1 + 5 * 2)
    assert masks("pretrain", GEMMA, blockSize=8192, perDeviceTrainBatchSize=8) == PAIRS * (1 + 5 * 2)
    assert masks("sft", GEMMA, **LONG | {"maxLength": 1023}) == 0
    assert masks("sft", GEMMA, packing=True, **LONG) == 0
    assert masks("sft", GEMMA, CPU, packing=True, **LONG) == PAIRS * (1 + 5 * 4)  # a CPU computes in float32 here


def test_families_that_are_packed_by_masks() -> None:
    """With chunked attention each layer has one of two kinds of masks."""
    assert masks("sft", LLAMA4, packing=True, **LONG) == PAIRS * (2 + 2 * 2)
    assert masks("sft", LLAMA4, **LONG) == PAIRS * (1 + 2)


def test_encoders() -> None:
    """Blocks have no padding; only layers with a window of 128 tokens have a mask."""
    fields = {"model_type": "modernbert", "dtype": "bfloat16"} | FIELDS["modernbert"]
    kinds = ["full_attention", "sliding_attention", "sliding_attention"] * 2
    encoder = fields | {"num_hidden_layers": 6, "max_position_embeddings": 8192, "layer_types": kinds}
    rows = {"blockSize": 8192, "perDeviceTrainBatchSize": 8}
    assert masks("pretrain", encoder, objective="masked", **rows) == PAIRS * (1 + 4 * 2)
    bert = {"model_type": "bert", "dtype": "bfloat16"} | FIELDS["bert"] | {"max_position_embeddings": 8192}
    assert masks("pretrain", bert, objective="masked", **rows) == 0
    assert masks("reward", bert, **LONG) == 2 * PAIRS * (1 + 2 * 2)


def test_what_sdpa_is_not() -> None:
    """Eager attention counts its scores elsewhere; flash attention has no mask."""
    for attention in ("eager", "flash_attention_2"):
        assert masks("sft", GEMMA, attention=attention, **LONG) == 0


def test_it_is_a_part_of_its_own() -> None:
    plan = planned("sft", GEMMA, **LONG)
    memory = plan.stages[0].memory
    assert memory.parts()["attention_masks"] == memory.attention_masks > 0
    assert memory.total == sum(memory.parts().values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_are_what_torch_keeps(checkpointing: bool) -> None:
    """The planned bytes equal the tensors [..., length, length] that a forward pass with left padding saves."""
    model = AutoModelForCausalLM.from_config(tiny("llama", num_hidden_layers=4)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch, length = 2, 61
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :7] = 0
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] == (length, length):
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.ones_like(mask), attention_mask=mask, use_cache=False)
    layers = 0 if checkpointing else 4
    assert [one.dtype for one in kept.values()].count(torch.float32) == layers
    biases = sum(one.untyped_storage().nbytes() for one in kept.values() if one.dtype == torch.float32)
    assert biases == mask_bytes(MaskedLayers(layers, 0), batch, length, 4, checkpointing=False)
