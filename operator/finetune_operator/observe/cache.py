"""Cache of the newest state of each job, run and pod, as compact views."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from finetune_api.report import AttemptReport
from finetune_operator.core.snapshot import JobView, Observed, PodView, RunView, Trouble, job_view

Json = dict[str, Any]
Key = tuple[str, str]
"""Namespace and name of a FineTuneJob."""


class Cache:
    """All known objects by job. The watches and the poller write it, the controller reads it, in one event loop."""

    def __init__(self) -> None:
        self.jobs: dict[Key, JobView] = {}
        self.reports: dict[Key, tuple[int, AttemptReport]] = {}
        self.troubles: dict[Key, Trouble] = {}
        self._runs: defaultdict[Key, dict[str, RunView]] = defaultdict(dict)
        self._pods: defaultdict[Key, dict[str, PodView]] = defaultdict(dict)

    def put_job(self, body: Json) -> Key:
        """Keep a job's newest state: a watch event may be older than an answer that is already stored."""
        key = (body["metadata"]["namespace"], body["metadata"]["name"])
        if not self.is_news(body):
            return key
        old = self.jobs.get(key)
        if old is not None and old.uid != body["metadata"]["uid"]:
            self.forget(key)
        self.jobs[key] = job_view(body)
        return key

    def is_news(self, body: Json) -> bool:
        """Whether a job's state is newer than the stored one. Resource versions compare as numbers (KEP-5504)."""
        old = self.jobs.get((body["metadata"]["namespace"], body["metadata"]["name"]))
        return old is None or int(body["metadata"]["resourceVersion"]) > old.version

    def forget(self, key: Key) -> None:
        """Remove a deleted job; its runs and pods are removed by their own events."""
        self.jobs.pop(key, None)
        self.reports.pop(key, None)
        self.troubles.pop(key, None)

    def put_run(self, namespace: str, run: RunView) -> Key:
        """Keep a run's newest state: an answer may be older than a watch event that is already stored."""
        key = (namespace, run.job)
        old = self.run_named(key, run.name)
        if old is None or old.version <= run.version:
            self._runs[key][run.name] = run
        return key

    def drop_run(self, key: Key, name: str) -> None:
        run = self.run_named(key, name)
        self._drop(self._runs, key, name)
        for pod in list(self._pods.get(key, {}).values()):
            if pod.gone and run is not None and pod.run == run.run:
                self._drop(self._pods, key, pod.name)

    def put_pod(self, namespace: str, pod: PodView) -> Key:
        key = (namespace, pod.job)
        self._keep_pod(key, pod)
        return key

    def drop_pod(self, key: Key, pod: PodView) -> None:
        """Mark a deleted pod as gone, and keep it while its run exists: it often goes before its run has failed."""
        if any(run.run == pod.run for run in self._runs.get(key, {}).values()):
            self._keep_pod(key, replace(pod, gone=True, ip=None))
        else:
            self._drop(self._pods, key, pod.name)

    def _keep_pod(self, key: Key, pod: PodView) -> None:
        """Store a pod and keep its `forced`: only the first event after a forced deletion shows it."""
        old = self._pods[key].get(pod.name)
        self._pods[key][pod.name] = replace(pod, forced=True) if old is not None and old.forced else pod

    def observed(self, key: Key) -> Observed | None:
        """Return the snapshot of a job, or None if the job is deleted."""
        job = self.jobs.get(key)
        if job is None:
            return None
        runs = tuple(self._runs.get(key, {}).values())
        pods = tuple(self._pods.get(key, {}).values())
        return Observed(job.body, runs, pods, self._report(key, runs), trouble=self.troubles.get(key))

    def run_named(self, key: Key, name: str) -> RunView | None:
        return self._runs.get(key, {}).get(name)

    def _report(self, key: Key, runs: tuple[RunView, ...]) -> AttemptReport | None:
        """Return the newest attempt's report; None if the last report came from an older attempt."""
        number, report = self.reports.get(key, (0, None))
        uid = self.jobs[key].uid
        return report if number == max((run.run for run in runs if run.owner == uid), default=0) else None

    def drivers(self) -> Iterator[tuple[Key, PodView]]:
        """Yield the running driver pods, which serve a report."""
        for key, pods in self._pods.items():
            for pod in pods.values():
                if pod.run > 0 and pod.index == 0 and pod.phase == "Running" and pod.ip and self._is_own(key, pod):
                    yield key, pod

    def _is_own(self, key: Key, pod: PodView) -> bool:
        """Whether a run of the job owns the pod: the run's token must not be sent to any other pod."""
        job = self.jobs.get(key)
        runs = (run for run in self._runs.get(key, {}).values() if job is not None and run.owner == job.uid)
        return any(run.run == pod.run and run.pods_owner == pod.owner for run in runs)

    @staticmethod
    def _drop(kind: defaultdict[Key, dict[str, Any]], key: Key, name: str) -> None:
        found = kind.get(key)
        if found is not None:
            found.pop(name, None)
            if not found:
                del kind[key]
