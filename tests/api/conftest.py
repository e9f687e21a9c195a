"""A valid job of every kind of stage, for the tests to break."""

from __future__ import annotations

import copy
from typing import Any

import pytest

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


@pytest.fixture
def job() -> dict[str, Any]:
    """A fresh copy of a valid job with one stage of each kind."""
    return copy.deepcopy(JOB)
