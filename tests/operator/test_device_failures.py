"""The operator handles device faults: class, advice, retry, and the node that the next attempt avoids."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from support.api.device_texts import TEXTS, DeviceText
from support.operator.worlds import NOW, VALID, attempt, body, pod, run, said, seen

from finetune_api.device_faults import FaultKind, Retry, device_fault
from finetune_operator.core.conditions import Reason
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import PodView, RunState
from finetune_operator.decide.actions import StartRun
from finetune_operator.decide.attempts import avoided
from finetune_operator.decide.classify import Ending, classify
from finetune_operator.decide.decide import decide
from finetune_operator.decide.oom_advice import with_advice
from finetune_operator.engines import ENGINES
from finetune_operator.render.run import Run

FRAMES = 'Traceback (most recent call last):\n  File "/x.py", line 1, in step\n    loss.backward()\n'
FAILED = run(state=RunState.FAILED)
REASONS = {
    None: (Reason.UNKNOWN, True),
    FaultKind.GPU: (Reason.GPU_FAULT, True),
    FaultKind.TOOLCHAIN: (Reason.USER_ERROR, False),
    FaultKind.DRIVER: (Reason.USER_ERROR, False),
    FaultKind.ARCHITECTURE: (Reason.USER_ERROR, False),
    FaultKind.PINNED_MEMORY: (Reason.USER_ERROR, False),
    FaultKind.DEVICE_ASSERT: (Reason.DEVICE_ASSERT, False),
    FaultKind.DEVICE_MEMORY: (Reason.DEVICE_OOM, False),
    FaultKind.SHARED_MEMORY: (Reason.SHARED_MEMORY, False),
    FaultKind.HOST_MEMORY: (Reason.OOM_KILLED, False),
    FaultKind.ILLEGAL_ACCESS: (Reason.ILLEGAL_ACCESS, True),
    FaultKind.NCCL_TIMEOUT: (Reason.RENDEZVOUS, True),
    FaultKind.NCCL_SYSTEM: (Reason.RENDEZVOUS, True),
}
"""The reason in the status, and whether the job is retried."""


def ended(message: str, code: int = 1, **fields: Any) -> PodView:
    node = fields.pop("said_node", None)
    return pod(exit_code=code, phase="Failed", termination_message=said(code, message, node=node), **fields)


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case.name)
def test_class_and_retry_of_a_text(case: DeviceText) -> None:
    found = classify(FAILED, (ended(f"{FRAMES}{case.error}: {case.text}"),), None)
    assert (found.reason, found.retryable) == REASONS[case.kind]
    assert found.counts and "\n" not in found.message


@pytest.mark.parametrize("case", [case for case in TEXTS if case.kind is not None], ids=lambda case: case.name)
def test_advice_comes_first_and_never_takes_device_memory_for_the_host_s(case: DeviceText) -> None:
    ending = classify(FAILED, (ended(f"{FRAMES}{case.error}: {case.text}"),), None)
    spec = {"stages": [{"sft": {"maxLength": 2048}}], "resources": {"gpusPerNode": 8}}
    found = with_advice(ending, body(**spec), {"plan": {"parameters": 8_000_000_000, "memoryBytes": 70 * 2**30}})
    assert found.message.endswith(f". {ending.message}") and found.message != ending.message
    if ending.reason is Reason.OOM_KILLED:
        assert found.message.startswith("Set resources.memoryPerNode, which is not set") and "70" not in found.message
    elif ending.reason is Reason.DEVICE_OOM:
        assert "perDeviceTrainBatchSize" in found.message and "memoryPerNode" not in found.message
    elif ending.reason is Reason.SHARED_MEMORY:
        assert found.message.startswith("Set kubernetes.sharedMemory to 3Gi (it is 2Gi)")
    else:
        assert case.advises in found.message


ECC = "AcceleratorError: CUDA error: uncorrectable ECC error encountered"


def test_the_node_of_the_fault_is_the_one_that_the_report_names() -> None:
    pods = (ended(ECC, said_node="node-b"), pod(index=1, node="node-b"))
    found = classify(FAILED, pods, None)
    assert (found.faulty_node, found.pod, found.node) == (True, "tiny-1-1-x", "node-b")


@pytest.mark.parametrize("said_node", [None, "node-of-another-team"])
def test_a_node_that_is_not_known_or_not_the_run_s_is_not_kept_away_from(said_node: str | None) -> None:
    found = classify(FAILED, (ended(ECC, said_node=said_node), pod(index=1, node="node-b")), None)
    assert (found.reason, found.faulty_node, found.node) == (Reason.GPU_FAULT, False, "node-a")


def test_of_a_single_node_no_name_is_needed() -> None:
    assert classify(FAILED, (ended(ECC),), None).faulty_node


def test_no_other_fault_blames_the_node() -> None:
    for case in TEXTS:
        fault = device_fault(f"{case.error}: {case.text}")
        elsewhere = fault is not None and fault.fault.retry is Retry.ELSEWHERE
        assert classify(FAILED, (ended(f"{case.error}: {case.text}"),), None).faulty_node is elsewhere


def test_a_node_beside_the_driver_s_that_found_itself_unfit() -> None:
    """The node's report is the cause: the driver was only stopped, and a retry would fail in the same way."""
    unfit = pod(
        index=1, node="node-b", exit_code=2, phase="Failed", termination_message=said(2, "driver 550 is too old")
    )
    found = classify(FAILED, (ended("stopped at step 0", code=75), unfit), None)
    assert (found.reason, found.retryable, found.node) == (Reason.USER_ERROR, False, "node-b")
    assert found.message == "pod tiny-1-1-x on node node-b: driver 550 is too old"


def test_a_node_beside_the_driver_s_whose_gpu_does_not_work() -> None:
    told = said(
        1, "GPU fault on node node-b: CUDA: found not usable, needed a kernel that runs on each GPU", node="node-b"
    )
    unfit = pod(index=1, node="node-b", exit_code=1, phase="Failed", termination_message=told)
    found = classify(FAILED, (ended("stopped at step 0", code=75), unfit), None)
    assert (found.reason, found.retryable, found.counts) == (Reason.GPU_FAULT, True, True)
    assert (found.faulty_node, found.node) == (True, "node-b")


SPEC: dict[str, Any] = {"resources": {"gpusPerNode": 8}, "runPolicy": {"backoffLimit": 3}}


def status(*attempts: dict[str, Any]) -> dict[str, Any]:
    return {"conditions": VALID, "observedGeneration": 1, "attempts": list(attempts), "attempt": len(attempts)}


def start_of(*attempts: dict[str, Any]) -> StartRun:
    decision = decide(seen(status(*attempts), **SPEC), Settings(token_key=b"x"), NOW + timedelta(hours=1))
    return next(action for action in decision.actions if isinstance(action, StartRun))


def test_the_next_attempts_keep_away_from_the_node() -> None:
    world = seen(status(attempt(1)), FAILED, ended(ECC, said_node="node-b"), pod(index=1, node="node-b"), **SPEC)
    record = decide(world, Settings(token_key=b"x"), NOW).status["attempts"][0]
    assert (record["reason"], record["faultyNode"], record["retryable"]) == ("GPUFault", "node-b", True)
    assert start_of(record).avoid == ("node-b",)
    assert start_of(record, attempt(2, "Evicted", 60, checkpoint=None)).avoid == ("node-b",)


def test_an_attempt_that_found_no_other_node_frees_the_next() -> None:
    broken = attempt(1, "GPUFault", 500, faultyNode="node-b")
    assert avoided(status(broken, attempt(2, "Unschedulable", 60))) == ()
    assert avoided(status(broken, attempt(2, "Unschedulable", 60), attempt(3, "GPUFault", 9, faultyNode="node-c"))) == (
        "node-c",
    )


def affinity_of(engine: str, avoid: tuple[str, ...], **template: Any) -> Any:
    job = body(**SPEC | {"resources": {"gpusPerNode": 8, "podTemplate": {"spec": template}}})
    made = ENGINES[engine].render(Run(job, 2, Settings(token_key=b"x"), avoid))
    if engine == "job":
        return made["spec"]["template"]["spec"].get("affinity")
    return made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].get("affinity")


@pytest.mark.parametrize("engine", ENGINES)
def test_pods_keep_away_by_the_name_of_the_node(engine: str) -> None:
    assert affinity_of(engine, ()) is None
    required = affinity_of(engine, ("a", "b"))["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    away = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in ("a", "b")]
    assert required == {"nodeSelectorTerms": [{"matchFields": away}]}


def test_each_of_the_user_s_own_terms_keeps_away() -> None:
    zones = [{"matchExpressions": [{"key": "zone", "operator": "In", "values": [zone]}]} for zone in ("x", "y")]
    wanted = {"nodeSelectorTerms": [*zones, {}]}
    own = {"podAffinity": {"x": 1}, "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": wanted}}
    found = affinity_of("job", ("a",), affinity=own)
    terms = found["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    away = [{"key": "metadata.name", "operator": "NotIn", "values": ["a"]}]
    assert terms == [*({**zone, "matchFields": away} for zone in zones), {}]
    assert found["podAffinity"] == {"x": 1}


def test_what_a_pod_cannot_be_placed_for_names_the_nodes() -> None:
    broken = attempt(1, "GPUFault", 500, faultyNode="node-b")
    waits = pod(2, phase="Pending", node=None, unschedulable="0/2 nodes are available")
    world = seen(status(broken, attempt(2)), run(2, RunState.PENDING), waits, **SPEC)
    running = next(
        item for item in decide(world, Settings(token_key=b"x"), NOW).status["conditions"] if item["type"] == "Running"
    )
    assert running["message"] == "0/2 nodes are available (not on node-b, where a GPU failed)"


def test_every_pod_knows_its_node() -> None:
    job = body(**SPEC | {"resources": {"gpusPerNode": 1, "podTemplate": {"spec": {"containers": [
        {"name": "trainer", "env": [{"name": "FINETUNE_NODE_NAME", "value": "of-the-user"}]}]}}}})  # fmt: skip
    container = ENGINES["job"].render(Run(job, 1, Settings(token_key=b"x")))["spec"]["template"]["spec"]["containers"][
        0
    ]
    named = [item for item in container["env"] if item["name"] == "FINETUNE_NODE_NAME"]
    assert named == [{"name": "FINETUNE_NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}]


def test_memory_that_sufficed_before_is_tried_again_for_dev_shm() -> None:
    full = next(case for case in TEXTS if case.kind is FaultKind.SHARED_MEMORY)
    told = said(3, full.text, checkpoint={"stage": 0, "step": 5, "uri": "s3://x/5"}, stages=[])
    world = seen(status(attempt(1)), FAILED, pod(exit_code=3, phase="Failed", termination_message=told), **SPEC)
    assert decide(world, Settings(token_key=b"x"), NOW).status["attempts"][0]["retryable"]


def test_an_ending_without_advice_stays_as_it_is() -> None:
    plain = Ending(Reason.RENDEZVOUS, "Connection closed by peer", True)
    assert with_advice(plain, body(), {}) == plain
