"""An attempt's report of itself: kept up to date by the driver's events, read by the report server."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import Any

from finetune_api.redact import redact
from finetune_api.report import TERMINATION_MESSAGE_BYTES, AttemptReport
from finetune_trainer.progress.reporter import Progress

Json = dict[str, Any]
_STEP = {
    "step": "step",
    "total": "total",
    "loss": "loss",
    "learning_rate": "learningRate",
    "tokens_per_second": "tokensPerSecond",
    "samples_per_second": "samplesPerSecond",
    "mfu": "mfu",
    "eta": "etaSeconds",
    "step_seconds_median": "stepSecondsMedian",
    "step_seconds_max": "stepSecondsMax",
    "slow_node": "slowNode",
    "slow_factor": "slowFactor",
}
METRICS_KEPT = 64
STALL_CHARACTERS = 1000
"""A termination message has room for them beside the message."""


class AttemptReporter:
    """A `Reporter` that turns what it is told into an `AttemptReport`.

    Args:
        titles: the stages' names, in order.
    """

    def __init__(self, titles: list[str]) -> None:
        self._stages: list[Json] = [{"name": title, "state": "Pending"} for title in titles]
        self._rest: Json = {}
        self._lock = threading.Lock()

    def finished_before(self, done: list[bool]) -> None:
        """Stages that an earlier attempt has finished."""
        with self._lock:
            for stage, over in zip(self._stages, done, strict=True):
                if over:
                    stage["state"] = "Succeeded"

    def report(self) -> AttemptReport:
        """How the attempt stands now."""
        with self._lock:
            return AttemptReport.model_validate({"stages": [dict(stage) for stage in self._stages], **self._rest})

    def stage_started(self, index: int, title: str, stages: int, message: str) -> None:
        with self._lock:
            stage = self._stages[index]
            stage["state"] = "Running"
            stage.setdefault("startTime", _now())
            self._rest["current"] = index
            self._rest.pop("step", None)
            self._rest.pop("waiting", None)

    def log(self, message: str) -> None:
        """Lines for people are in the pod's log."""

    def waiting(self, message: str) -> None:
        with self._lock:
            self._rest.pop("waiting", None)
            if message:
                self._rest["waiting"] = _tail(redact(message), 4096)

    def transport(self, network: str, gpu_direct: bool, words: str, warning: str) -> None:
        found: Json = {"network": network[:64], "gpuDirect": gpu_direct, "words": words[:256]}
        with self._lock:
            self._rest["transport"] = found | ({"warning": _head(redact(warning), 1024)} if warning else {})

    def placing(self, message: str) -> None:
        with self._lock:
            self._rest.pop("placing", None)
            if message:
                self._rest["placing"] = _tail(redact(message), 4096)

    def restarting(self, message: str) -> None:
        with self._lock:
            self._rest["restarting"] = _tail(redact(message), 4096)

    def stalled(self, message: str, node: str | None) -> None:
        with self._lock:
            self._rest["stalled"] = _tail(redact(message), STALL_CHARACTERS)
            if node is not None:
                self._rest["node"] = node[:253]

    def progress(self, progress: Progress) -> None:
        values = progress.to_json()
        with self._lock:
            self._rest.pop("restarting", None)
            if self._rest.pop("stalled", None):
                self._rest.pop("node", None)
            self._rest["step"] = {wire: values[name] for name, wire in _STEP.items() if name in values}
            if progress.metrics:
                self._stages[progress.stage]["metrics"] = _metrics(progress.metrics)

    def checkpoint_saved(self, index: int, step: int, place: str) -> None:
        with self._lock:
            self._rest["checkpoint"] = {"stage": index, "step": step, "uri": redact(place), "savedAt": _now()}

    def stage_finished(self, index: int, title: str, result: str, metrics: dict[str, float]) -> None:
        with self._lock:
            stage = self._stages[index]
            stage |= {"state": "Succeeded", "completionTime": _now(), "result": redact(result)}
            stage.setdefault("startTime", stage["completionTime"])
            stage["metrics"] = _metrics(metrics)
            self._rest.pop("restarting", None)

    def stopping(self) -> None:
        """The attempt was asked to stop."""
        with self._lock:
            self._rest["stopping"] = True

    def planned(self, plan: Json) -> None:
        """Preflight's plan, a `PlanReport`."""
        with self._lock:
            self._rest["plan"] = plan

    def ended(self, exit_code: int, message: str, node: str | None = None) -> None:
        """How it ended, secrets removed, and on which node where a GPU fault ended it."""
        with self._lock:
            self._rest |= {"exitCode": exit_code, "message": _tail(redact(message), 4096)}
            if node is not None:
                self._rest["node"] = node[:253]

    def close(self) -> None:
        """Nothing is held open."""


def termination_message(report: AttemptReport) -> str:
    """The report as JSON that fits a termination message: what is longest goes first, why it ended goes last."""
    data = report.to_json()
    for shorten in (_nothing, _without_metrics, _without_stages):
        data = shorten(data)
        text = _json(data)
        if len(text.encode()) <= TERMINATION_MESSAGE_BYTES:
            return text
    over = len(text.encode()) - TERMINATION_MESSAGE_BYTES
    words = data.get("message", "").encode("ascii", "replace").decode()
    return _json(data | {"message": _tail(words, max(len(words) - 2 * over - 16, 0))})


def _nothing(data: Json) -> Json:
    return data


def _without_metrics(data: Json) -> Json:
    return data | {"stages": [stage | {"metrics": {}} for stage in data["stages"]]}


def _without_stages(data: Json) -> Json:
    return data | {"stages": []}


def _json(data: Json) -> str:
    return AttemptReport.model_validate(data).model_dump_json(by_alias=True, exclude_none=True)


def _head(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _tail(text: str, limit: int) -> str:
    return text if len(text) <= limit else "…" + text[len(text) - limit + 1 :]


def _metrics(metrics: dict[str, float]) -> dict[str, float]:
    finite = {name: float(value) for name, value in metrics.items() if abs(value) < float("inf")}
    return dict(list(finite.items())[:METRICS_KEPT])


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
