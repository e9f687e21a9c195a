"""`finetune logs` selects the right pod and reads its log through the real API server, or reports why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from support.cluster.access import Access
from support.cluster.control_plane import ControlPlane
from support.cluster.finetune_command import Finetune, write_status
from support.cluster.finetune_jobs import Jobs, job
from support.cluster.kubelet_stand_in import KubeletStandIn
from support.cluster.log_stand_in import LogStandIn, PodLog

from finetune_operator.core import names

Json = dict[str, Any]
NODE = "log-node"


@pytest.fixture
def jobs(finetune_jobs: client.CustomObjectsApi, namespace: str) -> Jobs:
    return Jobs(finetune_jobs, namespace)


@pytest.fixture
def finetune(admin: Access, namespace: str, jobs: Jobs, tmp_path: Path) -> Finetune:
    jobs.create(job())
    return Finetune(admin.kubeconfig(tmp_path / "kubeconfig", namespace))


@pytest.fixture
def logs(control_plane: ControlPlane, core: client.CoreV1Api, kubelet: KubeletStandIn) -> Iterator[dict[str, PodLog]]:
    with LogStandIn(core, kubelet.node(NODE), control_plane.ca_file, control_plane.key_file) as stand_in:
        yield stand_in.logs


class Pods:
    """Pods with the labels that the operator sets."""

    def __init__(self, core: client.CoreV1Api, kubelet: KubeletStandIn, namespace: str) -> None:
        self.core, self.kubelet, self.namespace = core, kubelet, namespace

    def create(self, run: int, node: int = 0) -> str:
        name = f"tiny-{run}-{node}-abcde"
        labels = {**names.labels("tiny", run), "batch.kubernetes.io/job-completion-index": str(node)}
        containers = [{"name": names.CONTAINER, "image": "x"}, {"name": "sidecar", "image": "x"}]
        metadata = {"name": name, "labels": labels}
        self.core.create_namespaced_pod(self.namespace, {"metadata": metadata, "spec": {"containers": containers}})
        return name

    def running(self, run: int, node: int = 0) -> str:
        name = self.create(run, node)
        self.kubelet.running(self.namespace, name, node=NODE)
        return name

    def ended(self, name: str, code: int = 0) -> None:
        self.kubelet.finished(self.namespace, name, code)


@pytest.fixture
def pods(core: client.CoreV1Api, kubelet: KubeletStandIn, namespace: str) -> Pods:
    return Pods(core, kubelet, namespace)


def over(kind: str) -> list[Json]:
    return [{"type": kind, "status": "True", "reason": "Completed", "message": ""}]


def log_of(logs: dict[str, PodLog], name: str, *lines: str, ended: bool = False) -> PodLog:
    logs[name] = PodLog()
    logs[name].add(*lines)
    logs[name].ended = ended
    return logs[name]


def test_the_newest_attempt_and_any_other_node_and_run(
    finetune: Finetune, jobs: Jobs, pods: Pods, logs: dict[str, PodLog]
) -> None:
    for run, node in ((0, 0), (1, 0), (2, 0), (2, 1)):
        log_of(logs, pods.running(run, node), f"run {run}", f"node {node}", "ü")
    assert finetune("logs", "tiny").stdout == "run 0\nnode 0\nü\n"
    write_status(jobs, {"phase": "Running", "attempt": 2})
    assert finetune("logs", "tiny").stdout == "run 2\nnode 0\nü\n"
    assert finetune("logs", "tiny", "--node", 1, "--tail", 2).stdout == "node 1\nü\n"
    assert finetune("logs", "tiny", "--attempt", 1, "--tail", 3).stdout.startswith("run 1\n")
    assert finetune("logs", "tiny", "--preflight").stdout.startswith("run 0\n")


def test_no_log_says_why(finetune: Finetune, jobs: Jobs, pods: Pods, kubelet: KubeletStandIn) -> None:
    early = finetune("logs", "tiny")
    assert early.exit_code == 2 and "the pods of the preflight do not exist yet; -f waits" in early.stderr
    write_status(jobs, {"phase": "Running", "attempt": 1})
    name = pods.create(1)
    kubelet.unschedulable(pods.namespace, name, "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    waiting = finetune("logs", "tiny")
    assert waiting.exit_code == 2
    assert f"pod {name} has not started: Unschedulable: 0/3 nodes are available" in waiting.stderr
    assert "attempt 1 has no node 3: it has 0" in finetune("logs", "tiny", "--node", 3).stderr
    assert "tiny has no attempt 4: its latest run is attempt 1" in finetune("logs", "tiny", "--attempt", 4).stderr
    kubelet.image_pull_back_off(pods.namespace, name, node=NODE)
    assert "ImagePullBackOff: Back-off pulling image" in finetune("logs", "tiny").stderr
    write_status(jobs, {"phase": "Failed", "attempt": 1, "conditions": over("Failed")})
    kubelet.deleted(pods.namespace, name)
    kubelet.end_deletion(pods.namespace, name)
    gone = finetune("logs", "tiny", "-f")
    assert gone.exit_code == 2 and "the pods of attempt 1 and their logs were deleted" in gone.stderr


def test_following_goes_from_attempt_to_attempt_until_the_end(
    finetune: Finetune, jobs: Jobs, pods: Pods, logs: dict[str, PodLog]
) -> None:
    write_status(jobs, {"phase": "Running", "attempt": 1})
    with finetune.started("logs", "tiny", "-f") as process:
        assert process.stdout is not None and process.stderr is not None
        assert "has no pod for node 0 yet" in process.stderr.readline()
        logs["tiny-1-0-abcde"] = first = PodLog()
        pods.running(1)
        first.add("step 1")
        assert process.stdout.readline() == "step 1\n"
        first.add("step 2")
        assert process.stdout.readline() == "step 2\n"
        pods.ended("tiny-1-0-abcde", 1)
        first.end()
        write_status(jobs, {"phase": "Running", "attempt": 2})
        log_of(logs, "tiny-2-0-abcde", "resumed", ended=True)
        pods.running(2)
        assert process.stdout.readline() == "resumed\n"
        pods.ended("tiny-2-0-abcde")
        write_status(jobs, {"phase": "Succeeded", "attempt": 2, "conditions": over("Succeeded")})
        rest, notes = process.communicate(timeout=30)
        assert (rest, process.returncode) == ("", 0)
        assert "tiny: attempt 2" in notes and notes.rstrip().endswith("tiny: Succeeded")


def test_a_log_that_breaks_off_goes_on_without_loss_or_repeat(
    finetune: Finetune, jobs: Jobs, pods: Pods, logs: dict[str, PodLog]
) -> None:
    write_status(jobs, {"phase": "Running", "attempt": 1})
    name = "tiny-1-0-abcde"
    log = log_of(logs, name, *(f"line {number}" for number in range(5)))
    pods.running(1)
    with finetune.started("logs", "tiny", "-f", "--attempt", 1) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(5)] == [f"line {number}\n" for number in range(5)]
        log.cut()
        log.add("line 5", "line 6")
        assert [process.stdout.readline() for _ in range(2)] == ["line 5\n", "line 6\n"]
        pods.ended(name)
        log.end()
        assert process.communicate(timeout=30)[0] == ""
        assert process.returncode == 0


def test_an_attempt_that_is_gone_is_not_followed(finetune: Finetune, jobs: Jobs) -> None:
    write_status(jobs, {"phase": "Running", "attempt": 2, "attempts": [{"number": 1}, {"number": 2}]})
    gone = finetune("logs", "tiny", "-f", "--attempt", 1)
    assert gone.exit_code == 2 and "the pods of attempt 1 and their logs were deleted" in gone.stderr


def test_with_kuberay_the_driver_s_lines_are_in_the_head_s_log(
    finetune: Finetune, jobs: Jobs, pods: Pods, logs: dict[str, PodLog], core: client.CoreV1Api
) -> None:
    """The head's process starts the driver, as pod 0 of a Job does (`finetune_trainer.launch.node`)."""
    write_status(jobs, {"phase": "Running", "attempt": 1})
    log_of(logs, pods.running(1), "pretrain: step 1")
    labels = {"ray.io/node-type": "head", "batch.kubernetes.io/job-completion-index": None}
    core.patch_namespaced_pod("tiny-1-0-abcde", pods.namespace, {"metadata": {"labels": labels}})
    shown = finetune("logs", "tiny")
    assert (shown.stdout, shown.stderr) == ("pretrain: step 1\n", "")
