"""Statuses as the operator writes them, for tests of their readers."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
SINCE = "2026-11-24T03:00:00Z"


def conditions(**statuses: str) -> list[Json]:
    """Return conditions from `Running="True Training"`: status, reason and an optional message."""
    found = []
    for kind, words in statuses.items():
        status, reason, message = [*words.split(" ", 2), "", ""][:3]
        found.append({"type": kind, "status": status, "reason": reason, "message": message,
                      "lastTransitionTime": SINCE, "observedGeneration": 1})  # fmt: skip
    return found


RUNNING: Json = {
    "phase": "Running",
    "stage": "2/2 pretrain",
    "step": "4/10",
    "loss": "3.25",
    "eta": "1m",
    "attempt": 2,
    "observedGeneration": 1,
    "conditions": conditions(Validated="True Valid", Running="True Training"),
    "progress": {"step": 4, "total": 10, "loss": 3.25, "learningRate": 0.0002, "tokensPerSecond": 12345.0,
                 "etaSeconds": 90.0, "stageIndex": 1},
    "stages": [
        {"name": "tokenizer", "state": "Succeeded", "startTime": SINCE, "completionTime": "2026-11-24T03:02:05Z",
         "metrics": {"bytes_per_token": 2.5}, "result": "/pvc/t"},
        {"name": "pretrain", "state": "Running", "startTime": SINCE},
    ],
    "lastCheckpoint": {"stage": 1, "step": 3, "uri": "/pvc/c-3"},
    "attempts": [
        {"number": 1, "startTime": SINCE, "endTime": "2026-11-24T03:01:00Z", "reason": "NodeLost", "message": "gone"},
        {"number": 2, "startTime": SINCE},
    ],
}  # fmt: skip
SUCCEEDED: Json = {"phase": "Succeeded", "conditions": conditions(Succeeded="True Completed")}
FAILED: Json = {
    "phase": "Failed",
    "conditions": conditions(Failed="True CUDAOutOfMemory Set stages[1].pretrain.perDeviceTrainBatchSize to 4"),
    "failure": {"reason": "CUDAOutOfMemory", "message": "line 1\nCUDA out of memory \x1b[31m", "pod": "tiny-2-0-x",
                "node": "node-a", "exitCode": 1, "attempt": 2,
                "traceback": "Traceback (most recent call last):\n  step"},
}  # fmt: skip
