"""Fields of DeepSpeed's configuration that depend on the trained weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoConfig

from finetune_api.cluster import Sharding
from finetune_trainer.plan.communication import BUCKET, bucket_size, buffer_bytes
from finetune_trainer.plan.memory import Workload
from finetune_trainer.plan.model_size import AdapterSize, ModelSize, meta_model, model_size
from finetune_trainer.plan.states import gradient_bytes
from finetune_trainer.training.deepspeed import deepspeed_config

ADAPTER = AdapterSize(parameters=41_943_040, input_features=1, rank_features=1)


@pytest.fixture(scope="module")
def size() -> ModelSize:
    """Return the size of any model; only the adapter is trained."""
    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return model_size(meta_model(AutoConfig.for_model("qwen3", **small, num_attention_heads=1, head_dim=16)))


@pytest.mark.parametrize(
    ("trained", "expected"), [(None, BUCKET), (1, 65536), (41_943_040, 41_943_040), (10**10, BUCKET)]
)
def test_a_bucket_holds_no_more_than_the_gradients(trained: int | None, expected: int) -> None:
    config = deepspeed_config(Sharding(), 2, accelerator=True, trained=trained)
    assert config is not None
    zero = config["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket_size(trained) == expected


def test_the_plan_counts_the_buckets_that_are_set(size: ModelSize) -> None:
    """Two buffers of 41.9 million bfloat16 gradients (one on a CPU), and the rank's float32 slice of the gradients."""
    load = Workload(batch=1, length=1024, zero=2, workers=8, adapter=ADAPTER)
    slice_bytes = 4 * ADAPTER.parameters // 8
    assert buffer_bytes(size, load) == 2 * 2 * ADAPTER.parameters + slice_bytes
    assert buffer_bytes(size, replace(load, kind="cpu")) == 2 * ADAPTER.parameters + slice_bytes


@pytest.mark.parametrize(
    ("zero", "accumulates", "expected"), [(1, True, None), (2, False, None), (2, True, "fp32"), (3, True, "fp32")]
)
def test_bfloat16_gradients_are_added_up_in_float32(
    size: ModelSize, zero: int, accumulates: bool, expected: str | None
) -> None:
    config = deepspeed_config(Sharding(), zero, accelerator=True, accumulates=accumulates)
    assert config is not None
    assert config.get("data_types", {}).get("grad_accum_dtype") == expected
    load = Workload(batch=1, length=1024, zero=zero, adapter=ADAPTER, accumulation=2 if accumulates else 1)
    assert gradient_bytes(size, load) == ADAPTER.parameters * (4 if expected else 2)
