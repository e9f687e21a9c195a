"""Names, labels and ports of everything that the operator makes: the one truth about each."""

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
"""Nodes that an elastic run can do with; on its Job, so that its state can be read from it alone."""
CHECKPOINT_ANNOTATIONS = {name: f"{GROUP}/checkpoint-{name}" for name in ("stage", "step", "time")}
"""On a run's Job or RayJob and its pods: the last checkpoint's stage, from 0, its step, and when it was saved."""
FINALIZER = f"{GROUP}/storage"
"""On jobs whose storage is to be emptied before they go; on no others."""
PREFLIGHT_RUN, CLEANUP_RUN = 0, -1
"""Runs that are no attempts: those count from 1."""
_WORDS = {PREFLIGHT_RUN: PREFLIGHT, CLEANUP_RUN: CLEANUP}
KUEUE = "kueue.x-k8s.io/"
QUEUE_LABEL = f"{KUEUE}queue-name"
"""Kueue's labels are a job's own, and go on to its runs: the queue, the priority class, …"""
PARTIAL_ANNOTATION = f"{KUEUE}job-min-parallelism"
EQUAL_ANNOTATION = f"{KUEUE}job-completions-equal-parallelism"
"""By these Kueue may admit an elastic Job with fewer nodes than it would take (partial admission)."""
RAY_PORT = 6379
CONFIG_FILE = "run.json"
SHELL_FILE = "shell.sh"
"""What every bash of a pod under KubeRay reads first (`BASH_ENV`); beside the run's configuration."""
TOKEN_KEY = "auth_token"  # KubeRay's name for the key
CONFIG_DIRECTORY = "/etc/finetune"
TOKEN_DIRECTORY = "/etc/finetune-token"
CACHE_DIRECTORY = "/cache"
MANAGED_SELECTOR = f"{MANAGED_BY}={OPERATOR}"


def run_name(job: str, run: int) -> str:
    """Name of a run's Job or RayJob: at most 47 characters, for RayJobs. See `PREFLIGHT_RUN`."""
    return f"{job}-{_WORDS.get(run, run)}"


def support_name(job: str, run: int, uid: str, key: bytes, kind: str = "") -> str:
    """Name of what a run needs beside it (ConfigMap, Secret, Service).

    It ends in a mark of the job's uid, so that a job made again under its old name never meets the old one's objects
    while they are collected; and of the operator's key, so that nobody else can have such an object ready.
    """
    mark = hmac.new(key, f"{uid}/{run}/name/{kind}".encode(), hashlib.sha256).hexdigest()[:8]
    return f"{run_name(job, run)}-{mark}"


def labels(job: str, run: int) -> dict[str, str]:
    """Labels of all of a run's objects."""
    return {MANAGED_BY: OPERATOR, JOB_LABEL: job, RUN_LABEL: str(_WORDS.get(run, run))}


def run_of(metadata: dict[str, Any]) -> int | None:
    """The run that an object with these metadata belongs to; None where it belongs to none."""
    label = (metadata.get("labels") or {}).get(RUN_LABEL, "")
    word = next((run for run, word in _WORDS.items() if word == label), None)
    return int(label) if label.isdecimal() else word


def pod_zero_address(job: str, run: int, service: str, namespace: str) -> str:
    """DNS name of the pod that runs the Ray head and the driver, given the run's Service."""
    return f"{run_name(job, run)}-0.{service}.{namespace}.svc"


def mark_of(annotations: dict[str, str]) -> str:
    """The checkpoint that an object's annotations tell of, as one text; empty where they tell of none."""
    return " ".join(annotations.get(name, "") for name in CHECKPOINT_ANNOTATIONS.values()).strip()
