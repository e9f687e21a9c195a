"""Names, labels, annotations, ports and paths of the objects that the operator creates."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from finetune_api.claims import CLAIM_DIRECTORY as CLAIM_DIRECTORY
from finetune_api.job import GROUP
from finetune_api.labels import CLEANUP, JOB_LABEL, MANAGED_BY, PREFLIGHT, RUN_LABEL
from finetune_api.labels import CONTAINER as CONTAINER
from finetune_api.labels import OPERATOR as OPERATOR

LEAST_ANNOTATION = f"{GROUP}/min-nodes"
"""The least number of nodes of a run, on its main object, whose state can then be read from that object alone."""
CHECKPOINT_ANNOTATIONS = {name: f"{GROUP}/checkpoint-{name}" for name in ("stage", "step", "time")}
"""On the main object of a run and on its pods: the stage (from 0) and the step of the last checkpoint, and when it was
saved."""
FINALIZER = f"{GROUP}/storage"
"""On jobs whose storage is emptied before they are deleted, and on no others."""
PREFLIGHT_RUN, CLEANUP_RUN = 0, -1
"""Numbers of the runs that are not attempts. Attempts are numbered from 1."""
_HELPER_NAMES = {PREFLIGHT_RUN: PREFLIGHT, CLEANUP_RUN: CLEANUP}
KUEUE = "kueue.x-k8s.io/"
QUEUE_LABEL = f"{KUEUE}queue-name"
"""Kueue's labels, such as the queue and the priority class, are copied from a job to its runs."""
PARTIAL_ANNOTATION = f"{KUEUE}job-min-parallelism"
EQUAL_ANNOTATION = f"{KUEUE}job-completions-equal-parallelism"
"""With these annotations Kueue may admit an elastic run with fewer nodes than its maximum (partial admission)."""
RAY_PORT = 6379
CONFIG_FILE = "run.json"
TOKEN_KEY = "auth_token"  # the key that controllers of Ray clusters read, too
CONFIG_DIRECTORY = "/etc/finetune"
TOKEN_DIRECTORY = "/etc/finetune-token"
CACHE_DIRECTORY = "/cache"
MANAGED_SELECTOR = f"{MANAGED_BY}={OPERATOR}"


def run_name(job: str, run: int) -> str:
    """Return the name of a run's main object: at most 47 characters for an attempt, which all engines accept."""
    return f"{job}-{_HELPER_NAMES.get(run, run)}"


def support_name(job: str, run: int, uid: str, key: bytes, kind: str = "") -> str:
    """Return the name of a supporting object of a run: its ConfigMap, Secret, Service or NetworkPolicy.

    It ends with a hash of the job's uid and the operator's key. The uid keeps a job that is created again under the
    same name apart from the old job's objects, which the garbage collector may not have deleted yet. The key keeps
    other users from creating an object of that name beforehand.
    """
    suffix = hmac.new(key, f"{uid}/{run}/name/{kind}".encode(), hashlib.sha256).hexdigest()[:8]
    return f"{run_name(job, run)}-{suffix}"


def labels(job: str, run: int) -> dict[str, str]:
    """Return the labels of all objects of a run."""
    return {MANAGED_BY: OPERATOR, JOB_LABEL: job, RUN_LABEL: str(_HELPER_NAMES.get(run, run))}


def run_of(metadata: dict[str, Any]) -> int | None:
    """Return the number of the run that an object belongs to, from its metadata; None where it belongs to none."""
    label = (metadata.get("labels") or {}).get(RUN_LABEL, "")
    helper = next((run for run, name in _HELPER_NAMES.items() if name == label), None)
    return int(label) if label.isdecimal() else helper


def pod_zero_address(job: str, run: int, service: str, namespace: str) -> str:
    """Return the DNS name of the pod that runs the Ray head and the driver, below the run's Service."""
    return f"{run_name(job, run)}-0.{service}.{namespace}.svc"


def mark_of(annotations: dict[str, str]) -> str:
    """Return the checkpoint in an object's annotations as one text; empty where they have none."""
    return " ".join(annotations.get(name, "") for name in CHECKPOINT_ANNOTATIONS.values()).strip()
