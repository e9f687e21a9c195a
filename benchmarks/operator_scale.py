"""The operator with thousands of jobs at once on a real API server: `python benchmarks/operator_scale.py 1000 5000`.

Each number of jobs is a case with a fresh control plane on the loopback device, the chart's RBAC and settings, and a
fake kubelet that starts every pod. No driver answers on its port, as with jobs that have just started. Calls are
counted in the API server's audit log. `--preflight` adds a preflight to each job.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client
from support.cluster.access import Access, until
from support.cluster.auto_kubelet import AutoKubelet
from support.cluster.control_plane import ControlPlane
from support.cluster.finetune_jobs import job
from support.cluster.helm_chart import Installed, installed
from support.cluster.kubelet_stand_in import KubeletStandIn
from support.cluster.operator_process import OperatorProcess

from finetune_api.job import GROUP, PLURAL, VERSION
from finetune_operator.core.names import MANAGED_SELECTOR, RUN_LABEL

ROOT = Path(__file__).parents[1]
Json = dict[str, Any]
NAMESPACES = 10
WRITERS = 16
CPU_PAUSE = 1.0
OWN_SETTINGS = ("FINETUNE_HEALTH_PORT", "FINETUNE_LEASE", "FINETUNE_METRICS_PORT", "FINETUNE_NAMESPACES")
"""Settings of the chart for which this process has its own values."""


@dataclass
class Case:
    """One control plane with its operator, and its progress."""

    admin: Access
    api: client.ApiClient
    operator: OperatorProcess
    audit: Path
    peak: int = 0

    def phases(self) -> Counter[str]:
        """Return the number of jobs by phase, from the operator's metrics."""
        found = re.findall(r'finetune_jobs\{phase="(\w+)"\} (\S+)', self.operator.metrics())
        return Counter({phase: int(float(count)) for phase, count in found})

    def runs(self) -> int:
        """Return the number of batch/v1 Jobs on the API server, which are the attempts."""
        batch = client.BatchV1Api(self.api)
        listing = batch.list_job_for_all_namespaces(limit=1, _preload_content=False)
        found = json.loads(listing.data)
        return len(found["items"]) + (found["metadata"].get("remainingItemCount") or 0)

    def wait(self, what: str, done: Callable[[], bool], since: float, limit: float) -> float:
        """Return the seconds from `since` until `done()`, and sample the operator's memory meanwhile."""
        while not done():
            assert time.monotonic() - since < limit, f"{what}: not within {limit} s; {self.phases()}"
            self.peak = max(self.peak, self.operator.memory())
            time.sleep(CPU_PAUSE)
        return time.monotonic() - since

    def calls(self, since: int = 0) -> tuple[Counter[str], int]:
        """Count the operator's requests from byte `since` of the audit log on; also return the end of the log."""
        counted: Counter[str] = Counter()
        with self.audit.open("rb") as log:
            log.seek(since)
            for line in log:
                event = json.loads(line)
                counted[call_of(event)] += 1
            return counted, log.tell()


def call_of(event: Json) -> str:
    """Return verb and resource, such as `create pods` or `patch finetunejobs/status`, with the code of an error."""
    reference = event.get("objectRef") or {}
    resource = "/".join(filter(None, [reference.get("resource", event["requestURI"]), reference.get("subresource")]))
    code = (event.get("responseStatus") or {}).get("code", 200)
    return f"{event['verb']} {resource}" + (f" ({code})" if code >= 400 else "")


def audit_options(directory: Path) -> list[str]:
    """Return API server options for an audit log of the operator's service account only."""
    policy = {
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived", "ResponseStarted"],
        "rules": [
            {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},
            {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
            {"level": "None"},
        ],
    }
    file = directory / "audit-policy.json"
    file.write_text(json.dumps(policy))
    return [f"--audit-policy-file={file}", f"--audit-log-path={directory / 'audit.log'}"]


def create_jobs(admin: Access, count: int, *, preflight: bool) -> None:
    """Create `count` jobs over the namespaces, as fast as the API server accepts them."""

    def create(numbers: range) -> None:
        with admin.client() as api:
            objects = client.CustomObjectsApi(api)
            for number in numbers:
                body = job(f"job-{number}", kubernetes={"preflight": preflight})
                objects.create_namespaced_custom_object(GROUP, VERSION, namespace(number), PLURAL, body)

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(create, [range(first, count, WRITERS) for first in range(WRITERS)]))


def namespace(number: int) -> str:
    return f"team-{number % NAMESPACES}"


def prepare(admin: Access, api: client.ApiClient) -> None:
    """Create the CRD, the namespaces and a node."""
    definition = yaml.safe_load((ROOT / "crds" / "finetune.dev_finetunejobs.yaml").read_text())
    admin.apply(definition)
    core = client.CoreV1Api(api)
    for name in map(namespace, range(NAMESPACES)):
        core.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name=name)))
        until(core.list_namespaced_service_account, lambda found: found.metadata.name == "default", namespace=name)
    KubeletStandIn(core).node("node-a")


def settings(release: Installed) -> dict[str, str]:
    """Return the chart's settings of the operator, except those for which this process has its own values."""
    return {name: value for name, value in release.environment.items() if name not in OWN_SETTINGS}


def ended(pod: Json) -> int | None:
    """Return the exit code 0 for a preflight at once, and None for an attempt, which keeps running."""
    return 0 if pod["metadata"]["labels"].get(RUN_LABEL) == "preflight" else None


def measure(count: int, *, preflight: bool, idle_seconds: float, limit: float) -> Json:
    """Measure one case, starting from an empty control plane."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plane = stack.enter_context(ControlPlane(directory, audit_options(directory)))
        admin = plane.admin
        api = stack.enter_context(admin.client())
        prepare(admin, api)
        release = stack.enter_context(installed(admin, directory / "helm", {"crds": {"enabled": False}}))
        stack.enter_context(AutoKubelet(admin, "node-a", selector=MANAGED_SELECTOR, ends=ended))
        operator = OperatorProcess(release.access, directory / "operator", **settings(release))
        stack.enter_context(operator)
        case = Case(admin, api, operator, directory / "audit.log")
        return {"jobs": count, "preflight": preflight, **figures(case, count, preflight, idle_seconds, limit)}


def figures(case: Case, count: int, preflight: bool, idle_seconds: float, limit: float) -> Json:
    empty, cpu, started = case.operator.memory(), case.operator.cpu_seconds(), time.monotonic()
    _, before = case.calls()
    create_jobs(case.admin, count, preflight=preflight)
    created = time.monotonic() - started
    runs = count * (2 if preflight else 1)
    children = case.wait("children", lambda: case.runs() >= runs, started, limit)
    running = case.wait("running", lambda: case.phases()["Running"] == count, started, limit)
    calls, log = case.calls(before)
    cpu_running = case.operator.cpu_seconds() - cpu
    idle = quiet(case, log, idle_seconds)
    events = sum(number for call, number in calls.items() if call.startswith("create events"))
    others = {call: number for call, number in calls.items() if not re.match(r"create events|watch|list", call)}
    return {
        "created_s": round(created, 1),
        "children_s": round(children, 1),
        "running_s": round(running, 1),
        "calls_per_job": round(sum(others.values()) / count, 3),
        "events_per_job": round(events / count, 3),
        "calls": dict(sorted(calls.items())),
        "cpu_ms_per_job": round(1000 * cpu_running / count, 2),
        **idle,
        "rss_mib": {
            "empty": mib(empty),
            "peak": mib(max(case.peak, case.operator.memory())),
            "after": mib(case.operator.memory()),
        },
        "restart": restart(case, count, limit),
        "load": os.getloadavg()[0],
    }


def quiet(case: Case, log: int, seconds: float) -> Json:
    """Return the operator's writes per second and its CPU while no job changes."""
    cpu = case.operator.cpu_seconds()
    time.sleep(seconds)
    calls, _ = case.calls(log)
    writes = sum(number for call, number in calls.items() if not re.match(r"get|list|watch", call))
    return {
        "idle_writes_per_s": round(writes / seconds, 3),
        "idle_calls": dict(calls),
        "idle_cpu_percent": round(100 * (case.operator.cpu_seconds() - cpu) / seconds, 1),
    }


def restart(case: Case, count: int, limit: float) -> Json:
    """Start a new operator when all jobs run; return its time to list them, its requests, memory and CPU."""
    case.operator.kill()
    _, log = case.calls()
    started = time.monotonic()
    case.operator.start()
    case.wait("restart", lambda: case.phases()["Running"] == count, started, limit)
    seconds = time.monotonic() - started
    calls, _ = case.calls(log)
    return {
        "seconds": round(seconds, 1),
        "calls": dict(calls),
        "rss_mib": mib(case.operator.memory()),
        "peak_mib": mib(peak(case.operator.pid)),
        "cpu_s": round(case.operator.cpu_seconds(), 1),
    }


def peak(pid: int) -> int:
    """Return the peak resident bytes of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


def mib(count: int) -> int:
    return round(count / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int, default=[1000, 5000], help="numbers of jobs")
    parser.add_argument("--preflight", action="store_true", help="check each job first")
    parser.add_argument("--idle-seconds", type=float, default=60)
    parser.add_argument("--limit", type=float, default=1200, help="seconds that one case may take to run")
    given = parser.parse_args()
    for count in given.counts:
        found = measure(count, preflight=given.preflight, idle_seconds=given.idle_seconds, limit=given.limit)
        print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
