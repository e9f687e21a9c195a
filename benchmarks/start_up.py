"""From `kubectl apply` to the first training step on a cluster of two real nodes: `python benchmarks/start_up.py`.

Run it as root; `tests/e2e` says what the cluster needs. The image is present, the preflight runs first, and every job
has new prepared data and caches. Prints the median times of some jobs, by the clocks of the API server, the kubelets
and the driver's log. The import of a worker's libraries in a single process shows the speed of the cores at the time.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

from support.e2e.cluster_jobs import apply, long_job
from support.e2e.faults import Victim
from support.e2e.following import Following
from support.e2e.stage import set_up

from finetune_api.labels import CONTAINER, JOB_LABEL

Json = dict[str, Any]
SECONDS = 300
LIBRARIES = "import torch, datasets, accelerate, transformers.trainer"
MARKS = {
    "tokenizer begins": r"\[1/2 tokenizer\]",
    "workers run": r"\[2/2 pretrain\]: ",
    "model is built": r"pretrain: model ready",
    "first step": r"\[2/2 pretrain\] [1-9]",
}
"""Patterns of the driver's log, in order; the first matching line counts. One line may report several steps."""


def main() -> None:
    """Measure jobs one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=3, help="how many")
    parser.add_argument("--nodes", type=int, default=2, help="pods of a job, of one worker each")
    parser.add_argument("--no-fork-server", action="store_true", help="set FINETUNE_FORK_SERVER=0 in the job's pods")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        victim = set_up(stack, random.Random(0))
        template = victim.cluster.pod_template
        if arguments.no_fork_server:
            template = _without_fork_server(template)
        measured = [measure(victim, f"start-{number}", arguments.nodes, template) for number in range(arguments.jobs)]
    print(table(measured))
    print(f"{LIBRARIES}, in one process alone: {statistics.median(_import_seconds() for _ in range(3)):.1f} s")


def _import_seconds() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", LIBRARIES], check=True, capture_output=True)
    return time.monotonic() - began


def _without_fork_server(template: Json) -> Json:
    """Return a copy of a pod template whose trainer containers start processes without the fork server."""
    changed: Json = json.loads(json.dumps(template))
    containers = changed.setdefault("spec", {}).setdefault("containers", [])
    trainer = next((one for one in containers if one["name"] == CONTAINER), None)
    if trainer is None:
        trainer = {"name": CONTAINER}
        containers.append(trainer)
    trainer.setdefault("env", []).append({"name": "FINETUNE_FORK_SERVER", "value": "0"})
    return changed


def measure(victim: Victim, name: str, nodes: int, template: Json) -> dict[str, float]:
    """Return the seconds from the apply to each moment of one job's start."""
    began = datetime.now(UTC)
    apply(victim.admin, victim.namespace, long_job(name, template, steps=20, save=10, nodes=nodes))
    with Following(victim.admin, victim.namespace, name) as following:
        following.until(lambda it: it.status.get("phase") == "Succeeded", SECONDS, "success")
    moments = {**_of_pods(victim, name), **_of_log(victim, name)}
    found = {what: (moment - began).total_seconds() for what, moment in moments.items()}
    print(name, {what: round(seconds, 1) for what, seconds in found.items()}, flush=True)
    return found


def _of_pods(victim: Victim, name: str) -> dict[str, datetime]:
    """Return the moments from the pods' status; Kubernetes has no fractions of a second there."""
    selector = f"--selector={JOB_LABEL}={name}"
    done = victim.admin.kubectl("get", "pods", f"--namespace={victim.namespace}", selector, "--output=json")
    pods = json.loads(done.stdout)["items"]
    checked = next(pod for pod in pods if "preflight" in pod["metadata"]["name"])
    driver = next(pod for pod in pods if f"{name}-1-0-" in pod["metadata"]["name"])
    return {
        "preflight's container runs": _moment(_state(checked)["startedAt"]),
        "preflight has passed": _moment(_state(checked)["finishedAt"]),
        "attempt's pods are made": _moment(driver["metadata"]["creationTimestamp"]),
        "driver's container runs": _moment(_state(driver)["startedAt"]),
    }


def _state(pod: Json) -> Json:
    state = pod["status"]["containerStatuses"][0]["state"]
    found: Json = state.get("terminated") or state["running"]
    return found


def _of_log(victim: Victim, name: str) -> dict[str, datetime]:
    selector = f"--selector={JOB_LABEL}={name},batch.kubernetes.io/job-completion-index=0"
    options = ["--timestamps", "--tail=-1", selector, f"--namespace={victim.namespace}"]
    lines = [line.partition(" ") for line in victim.admin.kubectl("logs", *options).stdout.splitlines()]
    return {
        what: next(_moment(moment) for moment, _, text in lines if re.search(pattern, text))
        for what, pattern in MARKS.items()
    }


def _moment(text: str) -> datetime:
    """Parse an RFC 3339 time with a fraction of any length."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    return datetime.fromisoformat(f"{whole}.{(fraction or '0')[:6]:0<6}+00:00")


def table(measured: list[dict[str, float]]) -> str:
    """Return a Markdown table: the median of each moment, and the seconds since the one before."""
    rows, before = ["| moment | seconds after the apply | since the one before |", "|---|---|---|"], 0.0
    for what in measured[0]:
        now = statistics.median(one[what] for one in measured)
        rows.append(f"| {what} | {now:.1f} | {now - before:.1f} |")
        before = now
    return "\n".join(rows)


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"in {time.monotonic() - started:.0f} s")
