"""A job whose requirements the doctor reads."""

from __future__ import annotations

from typing import Any

JOB: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "tiny"},
    "spec": {
        "model": {"path": "/nowhere"},
        "stages": [{"sft": {"data": {"sources": [{"inline": [{"prompt": "a", "completion": "b"}]}]}, "maxSteps": 1}}],
        "storage": {"path": "runs"},
    },
}
