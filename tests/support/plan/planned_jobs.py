"""Jobs for the tests of plans, and plans as text."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from finetune_api.runconfig import RunConfig
from finetune_trainer.plan import render

DATA = {"sources": [{"inline": [{"text": "x"}]}]}
LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip


def run(*stages: dict[str, Any], model: dict[str, Any] = LLAMA_8B, **spec: Any) -> RunConfig:
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "planned"},
        "spec": {"model": {"config": model}, "stages": list(stages)} | spec,
    }
    return RunConfig.model_validate({"job": job, "root": "/tmp/x", "baseDir": "/tmp", "cacheDir": "/tmp/c"})


def text_of(plan: Any) -> str:
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(render(plan))
    return console.export_text()
