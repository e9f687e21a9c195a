"""The failure reason and the advice follow from the driver's message and from the state of the pods."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from support.operator.worlds import NOW, ago, body, pod, run, said

from finetune_operator.core.conditions import Reason
from finetune_operator.core.snapshot import Complaint, PodView, RunState
from finetune_operator.decide.classify import Ending, classify, waiting
from finetune_operator.decide.oom_advice import with_advice, with_preflight_advice
from finetune_operator.engines import ENGINES
from finetune_operator.engines.registry import observe_pod
from finetune_operator.observe.warning_events import complaints_of

FRAMES = 'Traceback (most recent call last):\n  File "/x.py", line 1, in step\n    loss.backward()\n'
FAILED = run(state=RunState.FAILED)


def ended(code: int, message: str, **fields: Any) -> PodView:
    return pod(exit_code=code, phase="Failed", termination_message=said(code, message), **fields)


def worker(**fields: Any) -> PodView:
    return pod(index=1, node="node-b", **fields)


CASES: dict[str, tuple[tuple[PodView, ...], Reason, str, bool, bool]] = {
    "a user error": ((ended(2, "model.hub: no such"),), Reason.USER_ERROR, "model.hub: no such", False, True),
    "a user error outweighs an eviction": (
        (ended(2, "bad"), worker(disruption="EvictionByEvictionAPI")), Reason.USER_ERROR, "bad", False, True),
    "CUDA": (
        (ended(3, FRAMES + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),),
        Reason.DEVICE_OOM, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", False, True),
    "CUDA, told in the midst": (
        (ended(1, "RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported\n"),),
        Reason.DEVICE_OOM, "RuntimeError: CUDA error: out of memory", False, True),
    "the host, told by Ray": (
        (ended(3, "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory."),),
        Reason.OOM_KILLED, "ray.exceptions.OutOfMemoryError: Task was killed", False, True),
    "the host, told by the kernel": (
        (pod(exit_code=137, terminated="OOMKilled"),), Reason.OOM_KILLED,
        "pod tiny-1-0-x used more memory than its limit", False, True),
    "another node's host": (
        (ended(1, "worker died"), worker(terminated="OOMKilled", exit_code=137)), Reason.OOM_KILLED,
        "pod tiny-1-1-x used", False, True),
    "a sidecar's": (
        (pod(terminated="OOMKilled", exit_code=137, failed_container="log"),), Reason.OOM_KILLED,
        "container log of pod tiny-1-0-x", False, True),
    "the node went": ((pod(reason="NodeLost", message="unresponsive"),), Reason.NODE_LOST, "NodeLost", True, False),
    "the node shut down": (
        (pod(reason="Terminated", message="node shutdown"),), Reason.NODE_LOST, "shutdown", True, False),
    "preempted": ((worker(disruption="PreemptionByScheduler"),), Reason.EVICTED, "PreemptionByScheduler", True, False),
    "evicted": ((pod(reason="Evicted", message="low on memory"),), Reason.EVICTED, "low on memory", True, False),
    "NCCL": (
        (ended(1, FRAMES + "torch.distributed.DistBackendError: NCCL error in: x.cpp:1, unhandled system error"),),
        Reason.RENDEZVOUS, "torch.distributed.DistBackendError: NCCL error in", True, True),
    "NCCL's watchdog": (
        (ended(1, "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)"),),
        Reason.RENDEZVOUS, "[Rank 3] Watchdog caught", True, True),
    "gloo": (
        (ended(1, "RuntimeError: [/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),),
        Reason.RENDEZVOUS, "Connection closed by peer", True, True),
    "no head": (
        (ended(1, "ConnectionError: failed to connect to GCS at 10.0.0.1"),), Reason.RENDEZVOUS, "GCS", True, True),
    "stopped": ((ended(75, "stopped at step 3"),), Reason.INTERRUPTED, "stopped at step 3", True, False),
    "anything": (
        (ended(1, FRAMES + "RuntimeError: what nobody expects"),), Reason.UNKNOWN, "RuntimeError: what nobody expects",
        True, True),
    "killed without a message": (
        (pod(exit_code=137, terminated="Error"),), Reason.UNKNOWN, "exit code 137, SIGKILL", True, True),
    "no pod at all": ((), Reason.UNKNOWN, "the trainer exited without an error message", True, True),
    "an init container whose code means what it likes": (
        (pod(exit_code=2, failed_container="fetch", termination_message="404"),), Reason.UNKNOWN,
        "container fetch ended with exit code 2", True, True),
    "a pod deleted by force": (
        (ended(75, "stopped at step 3"), worker(forced=True, exit_code=137, phase="Failed")), Reason.POD_DELETED,
        "pod tiny-1-1-x was deleted while it ran", True, False),
    "the driver's pod deleted by force": (
        (pod(forced=True), worker(exit_code=1, phase="Failed", gone=True)), Reason.POD_DELETED,
        "pod tiny-1-0-x was deleted while it ran", True, False),
    "a user error outweighs a pod that was deleted": (
        (ended(2, "bad"), worker(forced=True)), Reason.USER_ERROR, "bad", False, True),
    "an image": (
        (pod(phase="Pending", waiting=("ImagePullBackOff", "not found")),), Reason.IMAGE_PULL, "not found", True, True),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_ending(name: str) -> None:
    pods, reason, says, retryable, counts = CASES[name]
    found = classify(FAILED, pods, None)
    assert (found.reason, found.retryable, found.counts) == (reason, retryable, counts)
    assert says in found.message and "\n" not in found.message


def test_a_traceback_stands_beside_the_message_and_both_are_without_secrets() -> None:
    text = FRAMES + "ValueError: 401 for https://me:hunter2hunter2@example.org with hf_" + "a" * 30
    found = classify(FAILED, (ended(1, text),), None)
    assert found.message == "ValueError: 401 for https://***@example.org with ***"
    assert found.traceback.startswith("Traceback") and "hunter2" not in found.traceback and "hf_" not in found.traceback


def test_what_the_driver_said_stands_beside_what_kubernetes_saw() -> None:
    found = classify(FAILED, (ended(1, FRAMES + "ActorDiedError"), worker(terminated="OOMKilled", exit_code=137)), None)
    assert found.reason is Reason.OOM_KILLED and found.traceback.endswith("ActorDiedError")


def test_the_faults_of_a_bad_job_stay_whole() -> None:
    faults = "stages[0].sft.data: no such file\nmodel.hub: no such model"
    found = classify(FAILED, (ended(2, faults),), None)
    assert (found.message, found.traceback) == (faults, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{FRAMES}OSError: [Errno 28] No space left\n{FRAMES}    ^^^^^^^^^^", "OSError: [Errno 28] No space left"),
        (f"{FRAMES}    ^^^^^^^^^^\n", "loss.backward()"),
        ("    ^^^^^^^^^^", "the trainer exited without an error message (exit code 1)"),
    ],
    ids=["an error before it", "code alone", "nothing else"],
)
def test_a_traceback_that_is_torn_off_below_some_code(text: str, message: str) -> None:
    found = classify(FAILED, (pod(exit_code=1, phase="Failed", termination_message=text),), None)
    assert found.message == message


def test_the_log_s_end_of_a_driver_that_was_cut_off() -> None:
    """The kubelet uses the end of the log where there is no termination message."""
    found = classify(FAILED, (pod(exit_code=1, termination_message=FRAMES + "KeyError: 'x'\n"),), None)
    assert found.message == "KeyError: 'x'" and "loss.backward" in found.traceback


@pytest.mark.parametrize(("code", "signal"), [(137, "SIGKILL"), (143, "SIGTERM")])
def test_the_log_s_end_of_a_killed_driver_is_not_why_it_ended(code: int, signal: str) -> None:
    log = "[2/2 pretrain] 120/1500 · loss 4.3\n[2/2 pretrain] 130/1500 · loss 4.2"
    found = classify(FAILED, (pod(exit_code=code, phase="Failed", termination_message=log),), None)
    assert found.message == f"the trainer exited without an error message (exit code {code}, {signal})"
    assert found.traceback == log and found.retryable


STUCK = {
    "a quota": ((), ("FailedCreate", 'pods "x" is forbidden: exceeded quota'), Reason.FORBIDDEN),
    "KubeRay's": ((), ("FailedToCreateHeadPod", "forbidden"), Reason.FORBIDDEN),
    "a volume": ((pod(phase="Pending"),), ("FailedMount", 'secret "x" not found'), Reason.POD_CONFIG),
    "a network": ((pod(phase="Pending"),), ("FailedCreatePodSandBox", "no IP addresses"), Reason.STARTING),
    "the pod's own word first": (
        (pod(phase="Pending", node=None, unschedulable="0/3 nodes"),), ("FailedMount", "x"), Reason.UNSCHEDULABLE),
}  # fmt: skip


@pytest.mark.parametrize("name", STUCK)
def test_what_holds_a_run_up(name: str) -> None:
    pods, (reason, message), expected = STUCK[name]
    refused = any(reason in engine.create_failures for engine in ENGINES.values())
    found = waiting(pods, [Complaint(reason, message, refused)])
    assert found is not None and found[0] is expected


def test_events_of_an_older_object_of_that_name_are_not_heard() -> None:
    def event(reason: str, seconds: float) -> dict[str, Any]:
        return {"reason": reason, "message": "m", "lastTimestamp": ago(seconds), "metadata": {}}

    events = [event("Old", 100), event("Older", 5), event("Newest", 1)]
    events.append({"reason": "New", "eventTime": ago(3), "lastTimestamp": None, "metadata": {}})
    told = complaints_of(events, NOW - timedelta(seconds=10))
    assert [item.reason for item in told] == ["Newest", "New", "Older"]


def oom(reason: Reason = Reason.OOM_KILLED, **fields: Any) -> Ending:
    return Ending(reason, "why", False, **fields)


SFT = {"perDeviceTrainBatchSize": 1, "gradientAccumulationSteps": 4, "gradientCheckpointing": True, "maxLength": 2048}


def device(resources: dict[str, Any] | None = None, zero: Any = "auto", **fields: Any) -> dict[str, Any]:
    stages = [{"sft": SFT | fields}]
    return {"stages": stages, "sharding": {"zero": zero}, "resources": resources or {}}


def limited(name: str, memory: str) -> dict[str, Any]:
    return {"podTemplate": {"spec": {"containers": [{"name": name, "resources": {"limits": {"memory": memory}}}]}}}


ADVICE: dict[str, tuple[Ending, dict[str, Any], str]] = {
    "more of what is set": (
        oom(), {"resources": {"memoryPerNode": "8Gi"}}, "resources.memoryPerNode to 12Gi (it is 8Gi)"),
    "in fractions": (oom(), {"resources": {"memoryPerNode": "1.5Gi"}}, "to 3Gi (it is 1.5Gi)"),
    "set in the template": (oom(), {"resources": limited("trainer", "10G")}, "memoryPerNode to 15G (it is 10G)"),
    "by the plan": (
        oom(), {"resources": {"workersPerNode": 2}}, "to 12Gi (it is not set, and 2 x 4.0 GiB are planned)"),
    "a sidecar": (
        oom(container="log"), {"resources": limited("log", "64Mi")},
        "the memory limit of log in resources.podTemplate to 96Mi (it is 64Mi)"),
    "an even batch": (
        oom(Reason.DEVICE_OOM), device(perDeviceTrainBatchSize=8),
        "stages[0].sft.perDeviceTrainBatchSize to 4 (it is 8) and stages[0].sft.gradientAccumulationSteps to 8: the "
        "same batch in half the memory"),
    "an odd batch": (
        oom(Reason.DEVICE_OOM), device(perDeviceTrainBatchSize=9),
        "perDeviceTrainBatchSize to 3 (it is 9) and stages[0].sft.gradientAccumulationSteps to 12: the same batch in "
        "1/3 of the memory"),
    "recompute": (
        oom(Reason.DEVICE_OOM), device(gradientCheckpointing=False), "stages[0].sft.gradientCheckpointing to true"),
    "divide": (
        oom(Reason.DEVICE_OOM), device({"nodes": 2}), "sharding.zero to 3 and resources.nodes to 4 (it is 2)"),
    "shorter": (
        oom(Reason.DEVICE_OOM), device(zero=3),
        "stages[0].sft.maxLength to 1024 (it is 2048) or resources.nodes to 2 (it is 1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", ADVICE)
def test_advice_names_a_field_and_a_value(name: str) -> None:
    ending, spec, says = ADVICE[name]
    status = {"plan": {"parameters": 1, "memoryBytes": 4 * 2**30}}
    found = with_advice(ending, body(**spec), status)
    assert found.message.startswith("Set ") and says in found.message and found.message.endswith(". why")


def test_a_preflight_s_memory_is_the_operator_s() -> None:
    found = with_preflight_advice(oom(), "4Gi")
    assert found.message.startswith("Set the chart's jobs.preflight.memory to 6Gi (it is 4Gi), or kubernetes.preflight")


def test_the_trainer_s_own_end_counts_and_not_another_container_s() -> None:
    def container(name: str, **end: Any) -> dict[str, Any]:
        return {"name": name, "state": {"terminated": end} if end else {"running": {}}}

    def view(*containers: dict[str, Any]) -> PodView:
        labels = {"finetune.dev/job": "tiny", "finetune.dev/run": "1"}
        found = observe_pod(
            {"metadata": {"name": "p", "labels": labels}, "status": {"containerStatuses": list(containers)}}
        )
        assert found is not None
        return found

    both = view(container("side", exitCode=3, reason="Error"), container("trainer", exitCode=0, reason="Completed"))
    assert (both.exit_code, both.failed_container) == (0, "")
    one = view(container("side", exitCode=3, reason="Error"), container("trainer"))
    assert (one.exit_code, one.failed_container) == (3, "side")


def test_ray_s_list_of_what_an_actor_was_is_no_message() -> None:
    text = "ray.exceptions.ActorDiedError: The actor died\n\tclass_name: _Channel\n\tactor_id: 9a\n\tpid: 7"
    ended = classify(run(state=RunState.FAILED), (pod(exit_code=1, termination_message=said(1, text)),), None)
    assert ended.message == "ray.exceptions.ActorDiedError: The actor died"
