"""A valid job that has one stage of each kind."""

from __future__ import annotations

from typing import Any

DATA = {"sources": [{"file": "data.jsonl"}]}
JOB: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "tiny"},
    "spec": {
        "model": {"config": {"model_type": "llama"}},
        "stages": [
            {"tokenizer": {"data": DATA}},
            {"pretrain": {"data": DATA}},
            {"sft": {"data": DATA, "lora": {}}},
            {"dpo": {"data": DATA, "lora": {}, "reference": "adapterDisabled"}},
        ],
    },
}
MORE: dict[str, dict[str, Any]] = {
    "rlhf": {"rewards": [{"stage": "reward"}]},
    "online": {"judge": {"stage": "reward"}},
}
"""Fields that stages need in addition to data, of the kinds that `JOB` lacks."""
