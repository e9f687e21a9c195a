"""Labels of the objects that the operator creates for a job, and the name of the trainer container."""

from __future__ import annotations

from finetune_api.job import GROUP

MANAGED_BY = "app.kubernetes.io/managed-by"
OPERATOR = "finetune-operator"
JOB_LABEL = f"{GROUP}/job"
"""Name of the FineTuneJob."""
RUN_LABEL = f"{GROUP}/run"
"""The run that an object belongs to: `preflight`, `cleanup`, or the number of an attempt."""
NODE_INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
"""Kubernetes' own label of a pod whose engine numbers the nodes of a run from 0. Node 0 has the driver."""
ROLE_LABEL = f"{GROUP}/role"
"""Role of a pod whose engine does not number the nodes: `driver` or `worker`."""
DRIVER, WORKER = "driver", "worker"
PREFLIGHT = "preflight"
CLEANUP = "cleanup"
CONTAINER = "trainer"
"""Name of the trainer container. Settings of a container of this name in the pod template apply to it."""
