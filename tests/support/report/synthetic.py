"""A synthetic run directory with the files of a pipeline of four stages, some with hostile content."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from finetune_api.runconfig import RunConfig
from finetune_trainer.layout import DATA_REPORT, DONE, METRICS, RUN_CONFIG, SAMPLES, StageLayout

TITLES = ["tokenizer", "pretrain", "sft", "dpo"]
HOSTILE = '<script src="http://evil.example/x.js">alert(1)</script>\x1b[2J\x00\u202e</pre>{{ 7*7 }}'
LONG = "word " * 60_000


def layouts() -> list[StageLayout]:
    return [StageLayout(index, title) for index, title in enumerate(TITLES)]


def run_config(root: Path) -> RunConfig:
    data = {"sources": [{"inline": [{"text": HOSTILE.replace("\x00", "")}]}]}
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "quickstart"},
        "spec": {
            "model": {"config": {"model_type": "llama"}},
            "stages": [{kind: {"data": data}} for kind in TITLES],
        },
    }
    return RunConfig.model_validate(
        {"job": job, "root": str(root), "baseDir": "s3://me:secret@bucket/x", "cacheDir": "/tmp/cache"}
    )


def write_run(root: Path, finished: int = 4) -> None:
    """Write a run whose first `finished` stages are done and whose next one, if any, is running."""
    root.mkdir(parents=True, exist_ok=True)
    (root / RUN_CONFIG).write_text(json.dumps(run_config(root).to_json()))
    for layout in layouts()[: finished + 1]:
        stage = root / layout.root
        stage.mkdir(parents=True, exist_ok=True)
        (stage / DATA_REPORT).write_text(json.dumps(data_report(layout.title)))
        if layout.title != "tokenizer":
            (stage / METRICS).write_text(metrics(layout))
        if layout.title in ("sft", "dpo"):
            (stage / SAMPLES).write_text(json.dumps(sample_rows()))
        if layout.index < finished:
            (stage / DONE).write_text(json.dumps(done(layout.title)))


def data_report(title: str) -> dict[str, Any]:
    return {
        "rows": 12_345,
        "kept": 12_300,
        "tokens": 2_345_678,
        "trained_tokens": 1_234_567,
        "truncated_examples": 123 if title == "sft" else 0,
        "truncated_tokens": 4_567 if title == "sft" else 0,
        "dropped": {"too long": 40, "empty <b>": 5} if title == "sft" else {},
        "longest": 4_096,
        "packed_rows": 2_300,
        "packing_efficiency": 0.987,
        "max_length": 1_024,
        "eval_rows": 100,
        "bytes": 9_876_543,
        "seconds": 12.5,
        "tokens_per_second": 187_654.0,
        "cached": False,
        "some_new_field": "x",
    }


def metrics(layout: StageLayout) -> str:
    steps = {"pretrain": 3000, "sft": 150, "dpo": 60}[layout.title]
    lines = [json.dumps(row(layout, step, steps)) for step in range(steps + 1)]
    return "\n".join([*lines, '{"step": 2, "lo'])


def row(layout: StageLayout, step: int, steps: int) -> dict[str, Any]:
    warm = min(step / (0.1 * steps), 1.0)
    noise = math.sin(step * 12.9898) * math.cos(step * 78.233)
    values: dict[str, Any] = {"step": step, "stage": layout.index, "title": layout.title, "total": steps}
    if step % (steps // 5) == 0:
        values["metrics"] = {"eval_loss": 1.6 + 4 * math.exp(-4 * step / steps), "eval_runtime": 1.5}
    if step == 0:
        return values
    values |= {
        "loss": 1.5 + 4 * math.exp(-4 * step / steps) + 0.3 * noise,
        "learning_rate": 3e-4 * warm * 0.5 * (1 + math.cos(math.pi * step / steps)),
        "grad_norm": 1.0 + 300 * math.exp(-30 * step / steps) + 0.5 * abs(noise),
        "tokens": step * 4096,
        "tokens_per_second": 12_000 + 900 * noise,
        "memory": int(2e9 + 1e6 * step),
        "seconds": step * 0.34,
    }
    if layout.title == "dpo":
        values.setdefault("metrics", {}).update(
            {"rewards/accuracies": 0.5 + 0.2 * step / steps, "rewards/margins": noise}
        )
    return values


def sample_rows() -> dict[str, Any]:
    prompts = ["What does this function do?\n\ndef add(a, b):\n    return a + b", HOSTILE, "Tell me a long story."]
    reference = "It returns the sum of `a` and `b`."
    return {
        "before": [
            {"prompt": prompt, "output": "the the the of of\n\n\n", "reference": reference} for prompt in prompts
        ],
        "after": [
            {"prompt": prompts[0], "output": "It returns the sum of a and b.", "reference": reference},
            {"prompt": prompts[1], "output": HOSTILE, "reference": reference},
            {"prompt": prompts[2], "output": LONG, "reference": None},
        ],
    }


def done(title: str) -> dict[str, Any]:
    own: dict[str, dict[str, Any]] = {
        "tokenizer": {"bytes_per_token": 3.87},
        "pretrain": {"loss": 1.57, "eval_loss": 1.67, "eval_runtime": 1.2},
        "sft": {"loss": 1.52, "eval_loss": 1.65},
        "dpo": {"loss": 0.55, "eval_loss": 0.61, "eval_rewards/accuracies": 0.7},
    }
    return {
        "seconds": {"tokenizer": 3.0, "pretrain": 1020.0, "sft": 51.0, "dpo": 20.4}[title],
        "metrics": own[title],
        "steps": {"tokenizer": 0, "pretrain": 3000, "sft": 150, "dpo": 60}[title],
        "environment": {"torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
    }
