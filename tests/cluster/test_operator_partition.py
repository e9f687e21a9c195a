"""A network partition cuts one of two operators off from the API server, and only one acts at any time."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

from kubernetes import client
from support.cluster.access import Access
from support.cluster.faulty_proxy import FaultyProxy
from support.cluster.finetune_jobs import Jobs, driver, job
from support.cluster.kubelet_stand_in import KubeletStandIn
from support.cluster.operator_process import FAST, OperatorProcess, eventually

from finetune_api.job import PLURAL
from finetune_operator.core.names import JOB_LABEL, RUN_LABEL

LEASE_TIMES = {
    "FINETUNE_LEASE_DURATION_SECONDS": "6",
    "FINETUNE_LEASE_RENEW_DEADLINE_SECONDS": "3",
    "FINETUNE_LEASE_RETRY_SECONDS": "0.3",
}
STATUS = f"{PLURAL}/status"
LEASE = "finetune-operator-partition"


def twin(access: Access, namespace: str, directory: Path, name: str) -> OperatorProcess:
    own = {
        "FINETUNE_IDENTITY": name,
        "FINETUNE_LEASE": LEASE,
        "FINETUNE_NAMESPACES": namespace,
        "FINETUNE_OPERATOR_NAMESPACE": namespace,
        "FINETUNE_STATUS_SECONDS": "0",  # the status is written before the checkpoint's annotations
    }
    return OperatorProcess(access, directory / name, **(FAST | LEASE_TIMES | own))


def test_an_operator_that_is_cut_off_stops_before_the_next_begins(
    admin: Access, proxy: FaultyProxy, finetune_jobs: client.CustomObjectsApi, namespace: str, tmp_path: Path
) -> None:
    """A status that the first operator writes during the partition arrives late, and the API server rejects it."""
    jobs = Jobs(finetune_jobs, namespace)
    with admin.client() as api, twin(admin.at(proxy.url), namespace, tmp_path, "one") as one:
        kubelet = KubeletStandIn(client.CoreV1Api(api))
        two = twin(admin, namespace, tmp_path, "two")
        two._server.start(lambda: "waiting" in two.log(), timeout=30)
        try:
            uid = jobs.create(job())["metadata"]["uid"]
            (pod,) = kubelet.pods(namespace, 1, selector=f"{JOB_LABEL}=tiny,{RUN_LABEL}=1")
            with driver(uid, 1) as trainer:
                kubelet.running(namespace, pod)
                eventually(lambda: "phase Running" in one.log())  # the answer to that write has arrived
                proxy.cut_off()
                trainer.reporter.checkpoint_saved(1, 5, "/pvc/c-5")
                eventually(lambda: any(call.resource == STATUS for call in proxy.held))
                assert one.wait_for_death(20) and "stopped acting" in one.log()
                calls = len(proxy.calls)
                eventually(two.healthy)
                assert stopped_acting(one.log()) < acquired(admin, namespace)
                trainer.reporter.checkpoint_saved(1, 9, "/pvc/c-9")
                jobs.until(lambda status: status.get("lastCheckpoint", {}).get("step") == 9)
                proxy.heal()
                eventually(lambda: late_status(proxy) is not None)
                assert late_status(proxy) == 409 and len(proxy.calls) == calls
                assert jobs.read()["status"]["lastCheckpoint"]["step"] == 9
        finally:
            two._server.stop()


def late_status(proxy: FaultyProxy) -> int | None:
    """Return the API server's answer to the status that the partition delayed."""
    return next((code for call, code in proxy.late if call.resource == STATUS), None)


def stopped_acting(log: str) -> datetime:
    found = re.search(r"^(\S+ \S+) ERROR \S+ stopped acting$", log, re.MULTILINE)
    assert found is not None
    return datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f").astimezone()


def acquired(access: Access, namespace: str) -> datetime:
    text = access.kubectl("get", "lease", LEASE, f"--namespace={namespace}", "--output=json").stdout
    spec = json.loads(text)["spec"]
    assert spec["holderIdentity"] == "two" and spec["leaseTransitions"] == 2
    return datetime.fromisoformat(spec["acquireTime"])
