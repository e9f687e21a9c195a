"""The liveness probe fails for a dead watch, and not for a watch without events."""

from __future__ import annotations

from pathlib import Path

from kubernetes import client
from support.cluster.access import Access
from support.cluster.api_calls import Call, Fault
from support.cluster.faulty_proxy import FaultyProxy
from support.cluster.finetune_jobs import Jobs, job
from support.cluster.operator_process import OperatorProcess, eventually


def test_a_dead_watch_fails_the_probe_and_a_silent_one_does_not(
    admin: Access, proxy: FaultyProxy, finetune_jobs: client.CustomObjectsApi, namespace: str, tmp_path: Path
) -> None:
    def hang(call: Call) -> Fault | None:
        return Fault("delay", seconds=600) if call.verb == "watch" and call.resource == "finetunejobs" else None

    proxy.rule = hang
    settings = {"FINETUNE_NAMESPACES": namespace, "FINETUNE_WATCH_SILENCE_SECONDS": "1"}
    with OperatorProcess(admin.at(proxy.url), tmp_path, **settings) as operator:
        eventually(lambda: proxy.faults, timeout=60)  # the watch hangs after its initial list
        lists = len([call for call in proxy.calls if call.verb == "list"])
        eventually(lambda: operator.healthy() and len([c for c in proxy.calls if c.verb == "list"]) > lists, timeout=60)
        Jobs(finetune_jobs, namespace).create(job())
        eventually(lambda: not operator.healthy(), timeout=60)
