"""`finetune logs`: print or follow the log of a node, across attempts."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.labels import CONTAINER
from finetune_cli.cluster.connection import Query
from finetune_cli.cluster.errors import NOT_FOUND, ApiError, Unreachable
from finetune_cli.cluster.jobs import Jobs
from finetune_cli.cluster.pods import (
    by_node,
    has_ended,
    has_started,
    log_path,
    pods_path,
    run_title,
    selector,
    trouble,
)
from finetune_cli.cluster.reading import has_ended as job_has_ended
from finetune_cli.cluster.reading import hint_of, phase_of, status_of
from finetune_cli.cluster.watching import follow
from finetune_trainer.errors import UserError

Json = dict[str, Any]
CHECK_SECONDS = 5.0
"""Interval of checks of the job while a pod is awaited: the job may continue without that pod."""
RETRY_SECONDS = 1.0
"""Delay before a lost log stream is reopened."""


@dataclass(frozen=True)
class Logs:
    """Logs of the pods of one job. Methods raise UserError if the job, run or node does not exist."""

    jobs: Jobs
    name: str
    node: int = 0
    """Index of the node. Node 0 runs the driver."""
    tail: int | None = None
    """Number of lines from the end. None: all."""

    def print(self, run: int | None = None) -> None:
        """Print the log of a run: the number of an attempt, 0 for the preflight, None for the latest run."""
        job = self.jobs.read(self.name)
        number = _newest(job) if run is None else run
        pod = self._pods(number).get(self.node)
        if pod is None:
            raise self._absent(job, number)
        if not has_started(pod):
            raise UserError(f"{self._waiting(number, pod)}; -f waits for it")
        with self.jobs.explained_errors(self.name):
            for line in self.jobs.cluster.lines(log_path(pod), self._query(), None):
                _write(line)

    def follow(self, run: int | None = None) -> None:
        """Follow the log of one run to its end, or of the latest and all later runs until the job ends."""
        job = self.jobs.read(self.name)
        number: int | None = _newest(job) if run is None else run
        while number is not None:
            pod = self._started_pod(number)
            if pod is None and run is not None:
                raise self._absent(self.jobs.read(self.name), run)
            if pod is not None:
                with self.jobs.explained_errors(self.name):
                    self._stream(pod)
            number = None if run is not None else self._next(number)

    def _pods(self, run: int) -> dict[int, Json]:
        with self.jobs.explained_errors(self.name):
            return by_node(self.jobs.cluster.get(self._path(), selector(self.name, run))["items"])

    def _started_pod(self, run: int) -> Json | None:
        """Wait for the pod of a run and return it when it has a log; None if the job continued with a later run."""
        said = ""
        while True:
            job = self.jobs.read(self.name)
            waits = _newest(job) == run and not job_has_ended(job)
            deadline = time.monotonic() + (CHECK_SECONDS if waits else 0)
            with self.jobs.explained_errors(self.name):
                for seen in follow(self.jobs.cluster, self._path(), selector(self.name, run), deadline=deadline):
                    pod = by_node(list(seen.values())).get(self.node)
                    if pod is not None and has_started(pod):
                        return pod
                    said = _note(self._waiting(run, pod), said) if waits else said
            if _newest(job) > run:
                return None
            if not waits:
                raise self._absent(job, run)

    def _next(self, run: int) -> int | None:
        """Wait for the next run and return its number; None if the job has ended or was deleted."""
        said = ""
        for found in self.jobs.changes(self.name):
            job = next(iter(found.values()), None)
            if job is None or job_has_ended(job):
                _note(f"{self.name}: {phase_of(job)}" if job else f"{self.name} was deleted")
                return None
            if _newest(job) > run:
                _note(f"{self.name}: {run_title(_newest(job))}")
                return _newest(job)
            if phase_of(job) != "Running":
                said = _note(f"{self.name}: {phase_of(job)} {hint_of(job)}".strip(), said)
        return None

    def _stream(self, pod: Json) -> None:
        """Write the log to its end. After a lost connection, continue after the last line written.

        The timestamps of Kubernetes, which always have nine digits of nanoseconds, identify the written lines.
        """
        last, current = "", pod
        while True:
            over = has_ended(current)
            query = self._query() | {"follow": "true", "timestamps": "true"}
            if last:
                query = {"container": CONTAINER, "follow": "true", "timestamps": "true", "sinceTime": _whole(last)}
            try:
                for stamp, line in _after(last, self.jobs.cluster.lines(log_path(pod), query, None)):
                    _write(line)
                    last = stamp
                if over:
                    return
            except Unreachable as error:
                _note(f"connection lost ({error}), reconnecting")
            except ApiError as error:
                if error.code == NOT_FOUND:
                    return
                if not error.transient:
                    raise
            time.sleep(RETRY_SECONDS)
            current = self._current(pod)

    def _current(self, pod: Json) -> Json:
        """Return the current state of the pod, or the known one if the API server does not respond."""
        try:
            return self.jobs.cluster.get(log_path(pod).removesuffix("/log"))
        except Unreachable:
            return pod

    def _path(self) -> str:
        assert self.jobs.namespace is not None
        return pods_path(self.jobs.namespace)

    def _query(self) -> Query:
        query = {"container": CONTAINER}
        return query if self.tail is None else query | {"tailLines": str(self.tail)}

    def _waiting(self, run: int, pod: Json | None) -> str:
        if pod is None:
            return f"{run_title(run)} of {self.name} has no pod for node {self.node} yet"
        why = trouble(pod)
        return f"pod {pod['metadata']['name']} has not started" + (f": {why}" if why else "")

    def _absent(self, job: Json, run: int) -> UserError:
        newest, nodes = _newest(job), sorted(self._pods(run))
        if run > newest:
            return UserError(f"{self.name} has no attempt {run}: its latest run is {run_title(newest)}")
        if nodes:
            return UserError(f"{run_title(run)} has no node {self.node}: it has {', '.join(map(str, nodes))}")
        gone = status_of(job).get("attempts") or job_has_ended(job)
        why = "and their logs were deleted" if gone else "do not exist yet; -f waits for them"
        return UserError(
            f"the pods of {run_title(run)} {why}; `finetune status {self.name}` shows the state of the job"
        )


def _newest(job: Json) -> int:
    """Return the number of the latest attempt, or 0 (the preflight) before the first."""
    number = status_of(job).get("attempt")
    return number if isinstance(number, int) else 0


def _after(last: str, lines: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield timestamps and lines after the timestamp `last`."""
    for whole in lines:
        stamp, _, line = whole.partition(b" ")
        if stamp.decode("ascii", "replace") > last:
            yield stamp.decode("ascii", "replace"), line


def _whole(stamp: str) -> str:
    """Return the timestamp in whole seconds, the resolution of `sinceTime`."""
    return stamp.partition(".")[0] + "Z"


def _write(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _note(message: str, previous: str = "") -> str:
    """Print a message to standard error unless it equals the previous one, and return it."""
    if message != previous:
        print(message, file=sys.stderr, flush=True)
    return message
