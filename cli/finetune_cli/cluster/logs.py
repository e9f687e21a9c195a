"""`finetune logs`: what a node of a run prints, followed from attempt to attempt."""

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
    run_words,
    selector,
    trouble,
)
from finetune_cli.cluster.reading import has_ended as job_has_ended
from finetune_cli.cluster.reading import hint_of, phase_of, status_of
from finetune_cli.cluster.watching import follow
from finetune_trainer.errors import UserError

Json = dict[str, Any]
LOOK_SECONDS = 5.0
"""While a pod is awaited, how often the job is looked at: it may go on without that pod."""
PAUSE_SECONDS = 1.0
"""Between a log that broke off and the next try."""


@dataclass(frozen=True)
class Logs:
    """The logs of one job's pods. Methods raise UserError where there is no such job, run or node."""

    jobs: Jobs
    name: str
    node: int = 0
    """Whose log; 0 is the driver's."""
    tail: int | None = None
    """How many lines from the end; None: all."""

    def print(self, run: int | None = None) -> None:
        """The log so far of a run: the attempt of that number, 0 for the preflight, None for the newest."""
        job = self.jobs.read(self.name)
        number = _newest(job) if run is None else run
        pod = self._pods(number).get(self.node)
        if pod is None:
            raise self._absent(job, number)
        if not has_started(pod):
            raise UserError(f"{self._waiting(number, pod)}; -f waits for it")
        with self.jobs.telling(self.name):
            for line in self.jobs.cluster.lines(log_path(pod), self._query(), None):
                _write(line)

    def follow(self, run: int | None = None) -> None:
        """The log as it grows: of one run to its end; or from the newest on, until the job has ended."""
        job = self.jobs.read(self.name)
        number: int | None = _newest(job) if run is None else run
        while number is not None:
            pod = self._begun(number)
            if pod is None and run is not None:
                raise self._absent(self.jobs.read(self.name), run)
            if pod is not None:
                with self.jobs.telling(self.name):
                    self._stream(pod)
            number = None if run is not None else self._next(number)

    def _pods(self, run: int) -> dict[int, Json]:
        with self.jobs.telling(self.name):
            return by_node(self.jobs.cluster.get(self._path(), selector(self.name, run))["items"])

    def _begun(self, run: int) -> Json | None:
        """The run's pod once it has a log; None where the job has gone on without it."""
        said = ""
        while True:
            job = self.jobs.read(self.name)
            waits = _newest(job) == run and not job_has_ended(job)
            deadline = time.monotonic() + (LOOK_SECONDS if waits else 0)
            with self.jobs.telling(self.name):
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
        """The run after this one, once there is one; None when the job has ended or is gone."""
        said = ""
        for found in self.jobs.changes(self.name):
            job = next(iter(found.values()), None)
            if job is None or job_has_ended(job):
                _note(f"{self.name}: {phase_of(job)}" if job else f"{self.name} was deleted")
                return None
            if _newest(job) > run:
                _note(f"{self.name}: {run_words(_newest(job))}")
                return _newest(job)
            if phase_of(job) != "Running":
                said = _note(f"{self.name}: {phase_of(job)} {hint_of(job)}".strip(), said)
        return None

    def _stream(self, pod: Json) -> None:
        """Write the log to its end; where it breaks off earlier, go on after the last line written.

        Kubernetes' time stamps tell which lines were written already: nanoseconds, always nine digits.
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
                _note(f"connection lost ({error}), trying again")
            except ApiError as error:
                if error.code == NOT_FOUND:
                    return
                if not error.passing:
                    raise
            time.sleep(PAUSE_SECONDS)
            current = self._again(pod)

    def _again(self, pod: Json) -> Json:
        """The pod as it stands now; as it was, where the API server does not answer."""
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
            return f"{run_words(run)} of {self.name} has no pod of node {self.node} yet"
        why = trouble(pod)
        return f"pod {pod['metadata']['name']} has not begun" + (f": {why}" if why else "")

    def _absent(self, job: Json, run: int) -> UserError:
        newest, nodes = _newest(job), sorted(self._pods(run))
        if run > newest:
            return UserError(f"{self.name} has no attempt {run}: its newest run is {run_words(newest)}")
        if nodes:
            return UserError(f"{run_words(run)} has no node {self.node}: it has {', '.join(map(str, nodes))}")
        gone = status_of(job).get("attempts") or job_has_ended(job)
        why = "are gone, and their logs with them" if gone else "are not there yet; -f waits for them"
        return UserError(f"the pods of {run_words(run)} {why}; `finetune status {self.name}` says how it stands")


def _newest(job: Json) -> int:
    """The newest attempt; 0, the preflight, before the first."""
    number = status_of(job).get("attempt")
    return number if isinstance(number, int) else 0


def _after(last: str, lines: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """Time stamps and lines, without those up to `last`."""
    for whole in lines:
        stamp, _, line = whole.partition(b" ")
        if stamp.decode("ascii", "replace") > last:
            yield stamp.decode("ascii", "replace"), line


def _whole(stamp: str) -> str:
    """The stamp in whole seconds, which is all that `sinceTime` takes."""
    return stamp.partition(".")[0] + "Z"


def _write(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _note(words: str, before: str = "") -> str:
    """Words that are not the log's, on standard error, unless they were the last ones."""
    if words != before:
        print(words, file=sys.stderr, flush=True)
    return words
