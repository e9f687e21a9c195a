"""Labels on what the operator makes for a job, and the container that trains: by them others find a job's pods."""

from __future__ import annotations

from finetune_api.job import GROUP

MANAGED_BY = "app.kubernetes.io/managed-by"
OPERATOR = "finetune-operator"
JOB_LABEL = f"{GROUP}/job"
"""Name of the FineTuneJob."""
RUN_LABEL = f"{GROUP}/run"
"""Which run of it: `preflight`, or the attempt's number."""
PREFLIGHT = "preflight"
CLEANUP = "cleanup"
CONTAINER = "trainer"
"""The container that the pod template's own settings belong to."""
