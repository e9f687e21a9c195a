"""The operator is killed after each of its writes, and the job ends in the same state as without a crash."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from support.cluster.access import Access, namespace_of
from support.cluster.api_calls import Fault, at_write
from support.cluster.control_plane import ControlPlane
from support.cluster.faulty_proxy import FaultyProxy
from support.cluster.finetune_jobs import Jobs, job
from support.cluster.life import PATIENCE, Life, end_state
from support.cluster.operator_process import OperatorProcess

AT_ONCE = 3
SOME_WRITES = (2, 8, 14)
pytestmark = pytest.mark.timeout(1200, func_only=True)


class Lives:
    """Runs of a job, each in a separate namespace with a separate operator and proxy."""

    def __init__(self, control_plane: ControlPlane, directory: Path) -> None:
        self.plane, self.admin, self.directory = control_plane, control_plane.admin, directory

    def live(self, kill_at: int) -> tuple[dict[str, Any], int]:
        """Return the end state and the number of the operator's writes; kill it after write `kill_at` (0: never)."""
        plane = self.plane
        with (
            namespace_of(self.admin, f"life-{kill_at}") as namespace,
            FaultyProxy(plane.url, plane.ca_file, plane.key_file) as proxy,
            self.admin.client() as api,
        ):
            operator = OperatorProcess(
                self.admin.at(proxy.url),
                self.directory / str(kill_at),
                FINETUNE_NAMESPACES=namespace,
                FINETUNE_BACKOFF_SECONDS="0",
            )
            if kill_at:
                proxy.rule = at_write(kill_at, Fault("lose", then=operator.kill))
            jobs = Jobs(client.CustomObjectsApi(api), namespace)
            made = jobs.create(job(kubernetes={}))
            life = Life(jobs, client.CoreV1Api(api), made["metadata"]["uid"], f"127.0.1.{kill_at + 1}")
            with operator, life.going_on():
                if kill_at:
                    assert operator.wait_for_death(PATIENCE), f"no write {kill_at}"
                    operator.start()
                jobs.until_phase("Succeeded", timeout=4 * PATIENCE)
                return end_state(jobs, life), sum(call.is_write for call in proxy.calls)


def test_killed_after_some_writes(
    control_plane: ControlPlane, finetune_jobs: client.CustomObjectsApi, tmp_path: Path, admin: Access
) -> None:
    """The short form of the test after every write: an early, a middle and a late write of the job."""
    lives = Lives(control_plane, tmp_path)
    with ThreadPoolExecutor(len(SOME_WRITES) + 1) as pool:
        (undisturbed, writes), *killed = pool.map(lives.live, (0, *SOME_WRITES))
    assert undisturbed["attempts"] == [(1, "TrainingFailed"), (2, "Interrupted"), (3, "Completed")]
    assert writes > max(SOME_WRITES)
    assert {kill: end for kill, (end, _) in zip(SOME_WRITES, killed, strict=True) if end != undisturbed} == {}


@pytest.mark.long
def test_killed_after_every_write(
    control_plane: ControlPlane, finetune_jobs: client.CustomObjectsApi, tmp_path: Path, admin: Access
) -> None:
    lives = Lives(control_plane, tmp_path)
    undisturbed, writes = lives.live(0)
    assert undisturbed["attempts"] == [(1, "TrainingFailed"), (2, "Interrupted"), (3, "Completed")]
    assert undisturbed["pods"] == {"preflight": 1, "1": 1, "2": 1, "3": 1}
    assert writes > 15
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ends = dict(zip(range(1, writes + 1), pool.map(lives.live, range(1, writes + 1)), strict=True))
    assert {kill: end for kill, (end, _) in ends.items() if end != undisturbed} == {}
