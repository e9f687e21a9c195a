"""Seeded faults and restarts of the API server lose no job of the operator and repeat no work."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from support.cluster.access import Access, namespace_of
from support.cluster.api_calls import Call, Fault, Rule, schedule
from support.cluster.control_plane import ControlPlane
from support.cluster.faulty_proxy import FaultyProxy
from support.cluster.finetune_jobs import Jobs, driver, job
from support.cluster.kubelet_stand_in import KubeletStandIn
from support.cluster.life import PLAN, Life, end_state
from support.cluster.operator_process import OperatorProcess, eventually

from finetune_operator.core.names import JOB_LABEL, RUN_LABEL

NAMES = ("one", "two", "three")
RATE = 0.2
FAULTS = [
    Fault("drop"),
    Fault("lose"),
    Fault("delay", seconds=1.0),
    Fault("cut"),
    *(Fault("answer", status=status) for status in (409, 410, 429, 500)),
]
pytestmark = pytest.mark.timeout(400, func_only=True)


def faults(seed: int) -> Rule:
    """Return a rule that injects faults into the operator's calls.

    A watch may be cut or expire. Its response never ends, so it cannot be lost after the end. A list gets no "conflict"
    and no "expired": the API server never sends them, and kopf's watch would end until the probe restarts the operator.
    """
    any_fault = schedule(seed, RATE, FAULTS)

    def rule(call: Call) -> Fault | None:
        fault = any_fault(call)
        if fault is not None and call.verb in ("get", "list") and fault.status in (409, 410):
            return Fault("answer", status=503)
        return Fault("drop") if fault is not None and fault.kind == "lose" and call.verb == "watch" else fault

    return rule


def live(plane: ControlPlane, directory: Path, rule: Rule | None, block: int) -> tuple[dict[str, Any], FaultyProxy]:
    """Run several jobs under one operator and return their end states; drivers listen at 127.0.`block`.x."""
    with ExitStack() as stack:
        namespace = stack.enter_context(namespace_of(plane.admin, "faults"))
        proxy = stack.enter_context(FaultyProxy(plane.url, plane.ca_file, plane.key_file))
        api = stack.enter_context(plane.admin.client())
        settings = {"FINETUNE_NAMESPACES": namespace, "FINETUNE_BACKOFF_SECONDS": "0"}
        operator = OperatorProcess(plane.admin.at(proxy.url), directory, **settings)
        stack.enter_context(operator.kept_up())  # kopf exits if an answer is cut during API discovery
        proxy.rule = rule
        jobs = Jobs(client.CustomObjectsApi(api), namespace)
        lives = []
        for number, name in enumerate(NAMES, 1):
            made = jobs.create(job(name, kubernetes={}))
            ip = f"127.0.{block}.{number}"
            lives.append(Life(jobs, client.CoreV1Api(api), made["metadata"]["uid"], ip, name))
            stack.enter_context(lives[-1].going_on())
        for name in NAMES:
            jobs.until_phase("Succeeded", name, timeout=150)
        return {life.name: end_state(jobs, life) for life in lives}, proxy


def test_faults_of_every_kind_change_nothing_of_the_end(
    control_plane: ControlPlane, finetune_jobs: client.CustomObjectsApi, tmp_path: Path
) -> None:
    undisturbed, _ = live(control_plane, tmp_path / "calm", None, 10)
    for name in NAMES:
        assert undisturbed[name]["attempts"] == [(1, "TrainingFailed"), (2, "Interrupted"), (3, "Completed")]
        assert undisturbed[name]["pods"] == {"preflight": 1, "1": 1, "2": 1, "3": 1}
    for seed in (1, 2):
        disturbed, proxy = live(control_plane, tmp_path / str(seed), faults(seed), 10 + seed)
        assert disturbed == undisturbed
        struck = {(fault.kind, fault.status if fault.kind == "answer" else 0) for _, fault in proxy.faults}
        assert len(struck) >= 6, f"only {struck} struck"


def test_an_expired_watch_misses_nothing_that_went_meanwhile(
    control_plane: ControlPlane, finetune_jobs: client.CustomObjectsApi, tmp_path: Path, admin: Access
) -> None:
    """A Job is deleted while no watch is open: kopf receives no event for it, but a new list shows it."""
    blocked = False

    def rule(call: Call) -> Fault | None:
        if blocked and call.verb in ("watch", "list") and call.resource in ("jobs", "pods"):
            return Fault("drop")
        return None

    with (
        namespace_of(admin, "expired") as namespace,
        FaultyProxy(control_plane.url, control_plane.ca_file, control_plane.key_file, rule) as proxy,
        admin.client() as api,
    ):
        proxy.rule = lambda call: Fault("cut", chunks=3) if call.verb == "watch" else None
        jobs, kubelet = Jobs(client.CustomObjectsApi(api), namespace), KubeletStandIn(client.CoreV1Api(api))
        with OperatorProcess(admin.at(proxy.url), tmp_path, FINETUNE_NAMESPACES=namespace):
            jobs.create(job())
            (pod,) = kubelet.pods(namespace, 1, selector=f"{JOB_LABEL}=tiny,{RUN_LABEL}=1")
            kubelet.running(namespace, pod)
            jobs.until_phase("Running")
            blocked = True
            proxy.rule = rule
            control_plane.restart_apiserver()  # cuts the open watches
            client.BatchV1Api(api).delete_namespaced_job("tiny-1", namespace, propagation_policy="Background")
            kubelet.end_deletion(namespace, pod)
            blocked = False
            proxy.rule = _expire_once()
            kubelet.pods(namespace, 1, selector=f"{JOB_LABEL}=tiny,{RUN_LABEL}=2", timeout=60)
            seen = jobs.until(lambda status: status.get("attempt") == 2)
            assert seen["status"]["attempts"][0]["reason"] == "RunDeleted"


def test_without_a_watch_of_pods_it_is_known_how_they_ended(
    control_plane: ControlPlane, finetune_jobs: client.CustomObjectsApi, tmp_path: Path, admin: Access
) -> None:
    """Jobs show only that they ended; the plan and the cause of a failure are read from their pods."""

    def blind(call: Call) -> Fault | None:
        return Fault("drop") if (call.verb, call.resource) == ("watch", "pods") else None

    with (
        namespace_of(admin, "blind") as namespace,
        FaultyProxy(control_plane.url, control_plane.ca_file, control_plane.key_file, blind) as proxy,
        admin.client() as api,
    ):
        jobs, kubelet = Jobs(client.CustomObjectsApi(api), namespace), KubeletStandIn(client.CoreV1Api(api))
        with OperatorProcess(admin.at(proxy.url), tmp_path, FINETUNE_NAMESPACES=namespace):
            jobs.create(job(kubernetes={}))
            for run, code, message in (("preflight", 0, PLAN), ("1", 2, json.dumps({"exitCode": 2, "message": "bad"}))):
                (pod,) = kubelet.pods(namespace, 1, selector=f"{JOB_LABEL}=tiny,{RUN_LABEL}={run}")
                kubelet.running(namespace, pod)
                kubelet.finished(namespace, pod, code, message=message)
            status = jobs.until_phase("Failed")["status"]
        assert status["plan"] == json.loads(PLAN)["plan"] | {"warnings": []}
        assert (status["failure"]["reason"], status["failure"]["message"]) == ("UserError", "bad")


def _expire_once() -> Rule:
    """Return a rule that answers the next watch of each kind with 410 Gone."""
    told: set[str] = set()

    def rule(call: Call) -> Fault | None:
        if call.verb != "watch" or call.resource in told:
            return None
        told.add(call.resource)
        return Fault("answer", status=410)

    return rule


@pytest.mark.parametrize("kill", [False, True], ids=["restart", "kill -9"])
def test_the_api_server_goes_and_comes_again(
    kill: bool, control_plane: ControlPlane, finetune_jobs: client.CustomObjectsApi, tmp_path: Path, admin: Access
) -> None:
    with namespace_of(admin, "outage") as namespace, admin.client() as api, ExitStack() as stack:
        jobs, kubelet = Jobs(client.CustomObjectsApi(api), namespace), KubeletStandIn(client.CoreV1Api(api))
        stack.enter_context(OperatorProcess(admin, tmp_path, FINETUNE_NAMESPACES=namespace))
        made = [jobs.create(job(name)) for name in NAMES]
        control_plane.restart_apiserver(kill=kill)  # while the operator creates their objects
        for number, body in enumerate(made, 1):
            name, ip = body["metadata"]["name"], f"127.0.{20 + kill}.{number}"
            trainer = stack.enter_context(driver(body["metadata"]["uid"], 1, ip))
            trainer.reporter.checkpoint_saved(1, number, f"/pvc/c-{number}")
            (pod,) = kubelet.pods(namespace, 1, selector=f"{JOB_LABEL}={name},{RUN_LABEL}=1", timeout=120)
            kubelet.running(namespace, pod, ip=ip)
        for number, name in enumerate(NAMES, 1):
            jobs.until(lambda status, n=number: status.get("lastCheckpoint", {}).get("step") == n, name)  # type: ignore[misc]
        control_plane.restart_apiserver(kill=kill)  # while they run
        for pod in client.CoreV1Api(api).list_namespaced_pod(namespace).items:
            kubelet.finished(namespace, pod.metadata.name)
        for name in NAMES:
            done = jobs.until_phase("Succeeded", name, timeout=120)["status"]
            assert [item["reason"] for item in done["attempts"]] == ["Completed"]
        batch = client.BatchV1Api(api)
        assert sorted(item.metadata.name for item in batch.list_namespaced_job(namespace).items) == sorted(
            f"{name}-1" for name in NAMES
        )
        eventually(lambda: len(client.CoreV1Api(api).list_namespaced_pod(namespace).items) == len(NAMES))
