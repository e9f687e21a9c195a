"""The report of an attempt, which the driver's events update and the report server serves."""

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
"""Limit of a stall's description, so that it fits into a termination message together with the error."""


class AttemptReporter:
    """A `Reporter` that keeps an `AttemptReport`.

    Args:
        titles: names of the stages, in order.
    """

    def __init__(self, titles: list[str]) -> None:
        self._stages: list[Json] = [{"name": title, "state": "Pending"} for title in titles]
        self._rest: Json = {}
        self._lock = threading.Lock()

    def finished_before(self, done: list[bool]) -> None:
        """Mark the stages that an earlier attempt has finished."""
        with self._lock:
            for stage, finished in zip(self._stages, done, strict=True):
                if finished:
                    stage["state"] = "Succeeded"

    def report(self) -> AttemptReport:
        """Return the current report."""
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
        """Ignore log lines, which are in the pod's log."""

    def waiting(self, message: str) -> None:
        with self._lock:
            self._rest.pop("waiting", None)
            if message:
                self._rest["waiting"] = _tail(redact(message), 4096)

    def transport(self, network: str, gpu_direct: bool, words: str, warning: str) -> None:
        transport: Json = {"network": network[:64], "gpuDirect": gpu_direct, "words": words[:256]}
        with self._lock:
            self._rest["transport"] = transport | ({"warning": _head(redact(warning), 1024)} if warning else {})

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

    def checkpoint_saved(self, index: int, step: int, path: str) -> None:
        with self._lock:
            self._rest["checkpoint"] = {"stage": index, "step": step, "uri": redact(path), "savedAt": _now()}

    def stage_finished(self, index: int, title: str, result: str, metrics: dict[str, float]) -> None:
        with self._lock:
            stage = self._stages[index]
            stage |= {"state": "Succeeded", "completionTime": _now(), "result": redact(result)}
            stage.setdefault("startTime", stage["completionTime"])
            stage["metrics"] = _metrics(metrics)
            self._rest.pop("restarting", None)

    def stopping(self) -> None:
        """Record that the attempt was asked to stop."""
        with self._lock:
            self._rest["stopping"] = True

    def planned(self, plan: Json) -> None:
        """Record the plan of the preflight, a `PlanReport`."""
        with self._lock:
            self._rest["plan"] = plan

    def ended(self, exit_code: int, message: str, node: str | None = None) -> None:
        """Record the outcome.

        Args:
            exit_code: exit code of the driver.
            message: error message; secrets are removed.
            node: name of the node whose GPU fault has ended the attempt.
        """
        with self._lock:
            self._rest |= {"exitCode": exit_code, "message": _tail(redact(message), 4096)}
            if node is not None:
                self._rest["node"] = node[:253]

    def close(self) -> None:
        """Do nothing: no resources are open."""


def termination_message(report: AttemptReport) -> str:
    """Return the report as JSON that fits into a termination message.

    If it is too long, first the metrics, then the stages and finally the start of the error message are removed.
    """
    data = report.to_json()
    for shorten in (_unchanged, _without_metrics, _without_stages):
        data = shorten(data)
        text = _json(data)
        if len(text.encode()) <= TERMINATION_MESSAGE_BYTES:
            return text
    excess = len(text.encode()) - TERMINATION_MESSAGE_BYTES
    message = data.get("message", "").encode("ascii", "replace").decode()
    return _json(data | {"message": _tail(message, max(len(message) - 2 * excess - 16, 0))})


def _unchanged(data: Json) -> Json:
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
