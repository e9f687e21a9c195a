"""Prometheus metrics."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from finetune_operator.core.conditions import moment
from finetune_operator.observe.cache import Key

Json = dict[str, Any]
SECONDS = (1, 5, 15, 60, 300, 900, 3600, 14400, 86400, 604800)


class Metrics(Collector):
    """Counters and histograms, and gauges of the jobs that are computed at each scrape."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._phases: dict[Key, str] = {}
        self._progress: dict[Key, Json] = {}
        self._counted: dict[Key, int] = {}
        self._reconcile = Histogram(
            "finetune_reconcile_seconds", "Time of one reconcile of a job.", registry=self.registry
        )
        self._errors = Counter("finetune_reconcile_errors", "Reconciles that raised an error.", registry=self.registry)
        self._attempts = Counter(
            "finetune_attempts", "Attempts that ended, by reason.", ["reason"], registry=self.registry
        )
        self._queue = Histogram(
            "finetune_queue_seconds",
            "Time from creation to training.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._run = Histogram("finetune_run_seconds", "Time of an attempt.", buckets=SECONDS, registry=self.registry)
        self.registry.register(self)

    def serve(self, port: int) -> None:
        start_http_server(port, registry=self.registry)

    @contextmanager
    def reconciling(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except Exception:
            self._errors.inc()
            raise
        finally:
            self._reconcile.observe(time.perf_counter() - started)

    def seen(self, key: Key, body: Json, status: Json) -> None:
        """Record a reconcile: the job as it was, and its new status."""
        if "startTime" in status and "startTime" not in (body.get("status") or {}) and status.get("attempt") == 1:
            waited = moment(status["startTime"]) - moment(body["metadata"]["creationTimestamp"])
            self._queue.observe(waited.total_seconds())
        self._phases[key] = status.get("phase", "Pending")
        progress = status.get("progress") or {}
        if self._phases[key] == "Running" and progress:
            self._progress[key] = progress
        else:
            self._progress.pop(key, None)
        self._ended(key, status)

    def _ended(self, key: Key, status: Json) -> None:
        """Count each ended attempt once, except those that ended before this operator started."""
        ended = [record for record in status.get("attempts") or [] if "endTime" in record]
        last = ended[-1]["number"] if ended else 0
        before = self._counted.setdefault(key, last)
        for record in ended:
            if record["number"] > before:
                self._attempts.labels(record["reason"]).inc()
                took = moment(record["endTime"]) - moment(record["startTime"])
                self._run.observe(took.total_seconds())
        self._counted[key] = max(last, before)

    def forget(self, key: Key) -> None:
        for table in (self._phases, self._progress, self._counted):
            table.pop(key, None)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        jobs = GaugeMetricFamily("finetune_jobs", "Jobs by phase.", labels=["phase"])
        for phase, count in sorted(Tally(self._phases.values()).items()):
            jobs.add_metric([phase], count)
        yield jobs
        names = ["job_namespace", "job_name"]  # Prometheus sets `namespace` and `job` to those of the scrape target
        steps = GaugeMetricFamily("finetune_job_step", "Optimizer steps done in the running stage.", labels=names)
        tokens = GaugeMetricFamily("finetune_job_tokens_per_second", "Tokens per second.", labels=names)
        for key, progress in self._progress.items():
            steps.add_metric(key, progress["step"])
            tokens.add_metric(key, progress.get("tokensPerSecond") or 0.0)
        yield steps
        yield tokens
        yield self._step_seconds(names)

    def _step_seconds(self, names: list[str]) -> GaugeMetricFamily:
        """Return the step times of jobs with several workers: their gap is the time spent waiting for the slowest."""
        text = "Seconds of a worker's own part of a step: the median of all workers, and the slowest (max)."
        seconds = GaugeMetricFamily("finetune_job_step_seconds", text, labels=[*names, "worker"])
        for key, progress in self._progress.items():
            for label, field in (("median", "stepSecondsMedian"), ("max", "stepSecondsMax")):
                if progress.get(field) is not None:
                    seconds.add_metric([*key, label], progress[field])
        return seconds
