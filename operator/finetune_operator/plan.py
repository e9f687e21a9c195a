"""The operations on the API server that carry out the actions of a decision, in their order (pure)."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from finetune_api.job import API_VERSION, GROUP, KIND, PLURAL, VERSION
from finetune_operator.core import names
from finetune_operator.core.conditions import stamp
from finetune_operator.core.settings import Settings
from finetune_operator.decide.actions import (
    AbandonRun,
    Action,
    DeleteJob,
    DeleteRun,
    Event,
    HoldJob,
    MarkCheckpoint,
    StartRun,
)
from finetune_operator.engines import ENGINES
from finetune_operator.engines.registry import engine_for
from finetune_operator.render.run import Run
from finetune_operator.render.support import support_objects

Json = dict[str, Any]
_PLURALS = {
    "ConfigMap": "configmaps",
    "Secret": "secrets",
    "Service": "services",
    "NetworkPolicy": "networkpolicies",
    "Event": "events",
}


@dataclass(frozen=True)
class Create:
    """Create an object. An object of that name that exists already stays as it is."""

    path: str
    """Of the collection."""
    body: Json = field(repr=False)
    run: bool = False
    """Whether this is the main object of a run. Its name has no uid, so an existing one must belong to the same job."""
    with_run: bool = False
    """Whether the main object of the run, which is created just before, owns it too. Kubernetes then deletes it after
    that object."""


@dataclass(frozen=True)
class Delete:
    """Delete an object and the objects that it owns. An object that is gone is no error."""

    path: str
    uid: str | None = None
    """Delete only the object with this uid."""
    children_first: bool = True
    """Whether the object stays until the objects that it owns are gone."""


@dataclass(frozen=True)
class PatchStatus:
    """Merge into a job's status if the job is still the object and version that the decision was made from.

    The version keeps an operator that has lost its Lease from writing over the status of its successor.
    """

    path: str
    uid: str
    version: str
    status: Json = field(repr=False)


@dataclass(frozen=True)
class SetFinalizers:
    """Replace the finalizers of a job if it has not changed since: other controllers may write to the list, too."""

    path: str
    version: str
    finalizers: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the operator's finalizer is among them. Without it the job may be gone at once."""
        return names.FINALIZER in self.finalizers


@dataclass(frozen=True)
class Annotate:
    """Merge into the annotations of an object. An object that is gone is no error."""

    path: str
    annotations: dict[str, str]


Operation = Create | Delete | PatchStatus | SetFinalizers | Annotate


def plan(body: Json, actions: tuple[Action, ...], settings: Settings) -> list[Operation]:
    """Return the operations of the actions. `StopRun` has none: it is a request to the driver of the run."""
    operations: list[Operation] = []
    for action in actions:
        if isinstance(action, StartRun):
            operations += _start(Run(body, action.run, settings, action.avoid, action.rather_not))
        elif isinstance(action, DeleteRun | AbandonRun):
            path = run_path(Run(body, action.run, settings), action.engine)
            operations.append(Delete(path, children_first=isinstance(action, DeleteRun)))
        elif isinstance(action, MarkCheckpoint):
            operations += _annotate(Run(body, action.run, settings), action)
        elif isinstance(action, HoldJob):
            operations.append(_set_finalizer(body["metadata"], action.hold))
        elif isinstance(action, DeleteJob):
            operations.append(Delete(job_path(body["metadata"]), body["metadata"]["uid"]))
    return operations


def _annotate(run: Run, action: MarkCheckpoint) -> list[Annotate]:
    pods, _ = pods_query(run.namespace, run.job, run.number)
    paths = [run_path(run, action.engine)] if action.main else []
    return [Annotate(path, action.annotations) for path in (*paths, *(f"{pods}/{name}" for name in action.pods))]


def _set_finalizer(metadata: Json, hold: bool) -> SetFinalizers:
    others = [name for name in metadata.get("finalizers") or [] if name != names.FINALIZER]
    finalizers = (*others, names.FINALIZER) if hold else tuple(others)
    return SetFinalizers(job_path(metadata), metadata["resourceVersion"], finalizers)


def _start(run: Run) -> list[Operation]:
    """Return the operations that start a run.

    The main object comes last, so that its presence says that the run has started with everything that it needs.
    A Secret that the main object owns can only come after it; the kubelet waits for the Secret.
    """
    engine = engine_for(run)
    main, support = engine.render(run), support_objects(run, engine.ingress, engine_for(run.config_run).config_files)
    later = [item for item in support if engine.deletion_reads_secret and item["kind"] == "Secret"]
    before = [Create(_collection(item), item) for item in support if item not in later]
    after = [Create(_collection(item), item, with_run=True) for item in later]
    return [*before, Create(engine.collection(run.namespace), main, True), *after]


def owned_by(create: Create, main: Json) -> Create:
    """Return the operation with one more owner: the main object of the run, as the API server returned it."""
    body = copy.deepcopy(create.body)
    owner = {"apiVersion": main["apiVersion"], "kind": main["kind"], **_identity(main)}
    body["metadata"]["ownerReferences"].append(owner | {"controller": False, "blockOwnerDeletion": False})
    return replace(create, body=body)


def _identity(body: Json) -> Json:
    return {name: body["metadata"][name] for name in ("name", "uid")}


def run_path(run: Run, engine: str) -> str:
    """Return the path of the main object of a run on the engine of that name."""
    return f"{ENGINES[engine].collection(run.namespace)}/{run.name}"


def pods_query(namespace: str, job: str, run: int) -> tuple[str, str]:
    """Return the path and the query of the pods of a run."""
    selectors = (f"{name}%3D{value}" for name, value in names.labels(job, run).items())
    return f"/api/v1/namespaces/{namespace}/pods", f"labelSelector={'%2C'.join(selectors)}"


def job_path(metadata: Json) -> str:
    return f"/apis/{GROUP}/{VERSION}/namespaces/{metadata['namespace']}/{PLURAL}/{metadata['name']}"


def patch_status(body: Json, status: Json) -> PatchStatus:
    """Return the merge patch that turns the current status into `status`: fields that it lacks are set to null."""
    before = body.get("status") or {}
    changed: Json = {name: None for name in before if name not in status}
    updates = {name: value for name, value in status.items() if before.get(name) != value}
    changed |= {name: _merge_value(before.get(name), value) for name, value in updates.items()}
    metadata = body["metadata"]
    return PatchStatus(f"{job_path(metadata)}/status", metadata["uid"], metadata["resourceVersion"], changed)


def _merge_value(before: Any, value: Any) -> Any:
    """Return the value of a merge patch. Patches merge mappings, so keys that are gone are set to null."""
    if isinstance(before, dict) and isinstance(value, dict):
        return {name: None for name in before if name not in value} | value
    return value


def event(body: Json, event: Event, now: datetime) -> Create:
    """Return the creation of a Kubernetes event about the job.

    The event's name is a hash of its text and of the job's resourceVersion: an operator that restarts before it has
    written the next status creates the same event, which then exists already.
    """
    metadata = body["metadata"]
    identity = f"{metadata['uid']}/{metadata.get('resourceVersion')}/{event.type}/{event.reason}/{event.message}"
    item = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{metadata['name']}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
            "namespace": metadata["namespace"],
        },
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:1024],
        "source": {"component": names.OPERATOR},
        "reportingComponent": names.OPERATOR,
        "firstTimestamp": stamp(now),
        "lastTimestamp": stamp(now),
        "count": 1,
    }
    return Create(_collection(item), item)


def _collection(item: Json) -> str:
    group = item["apiVersion"]
    base = f"/apis/{group}" if "/" in group else f"/api/{group}"
    return f"{base}/namespaces/{item['metadata']['namespace']}/{_PLURALS[item['kind']]}"
