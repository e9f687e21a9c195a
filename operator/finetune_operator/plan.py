"""A decision's actions as operations on the API server, in the order in which they are to be done (pure)."""

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
from finetune_operator.engines import ENGINES, Engine, engine_of, indexed_job
from finetune_operator.render.run import Run
from finetune_operator.render.support import support_objects

Json = dict[str, Any]
_PLURALS = {
    "ConfigMap": "configmaps",
    "Secret": "secrets",
    "Service": "services",
    "NetworkPolicy": "networkpolicies",
    "Job": "jobs",
    "RayJob": "rayjobs",
    "Event": "events",
}


@dataclass(frozen=True)
class Create:
    """Make an object; one of that name that is there already is left as it is.

    `run`: it is a run's main object, whose name has no uid in it: one that is there must be this job's own.
    """

    path: str
    body: Json = field(repr=False)
    run: bool = False
    with_run: bool = False
    """Whether the run's main object, made just before, owns it too: it then goes after that object."""


@dataclass(frozen=True)
class Delete:
    """Delete an object and what it owns; nothing where it is gone."""

    path: str
    uid: str | None = None
    children_first: bool = True
    """Whether the object stays until what it owns has gone."""


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
    """Replace a job's finalizers, if the job is still as it was seen: others may write to the list too."""

    path: str
    version: str
    finalizers: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the job stays after it: one that is let go may be gone the next moment."""
        return names.FINALIZER in self.finalizers


@dataclass(frozen=True)
class Annotate:
    """Merge into an object's annotations; nothing where the object is gone."""

    path: str
    annotations: dict[str, str]


Operation = Create | Delete | PatchStatus | SetFinalizers | Annotate


def plan(body: Json, actions: tuple[Action, ...], settings: Settings) -> list[Operation]:
    """What the actions are made of. `StopRun` is no operation of the API server: it goes to the run itself."""
    operations: list[Operation] = []
    for action in actions:
        if isinstance(action, StartRun):
            operations += _start(Run(body, action.run, settings, action.avoid, action.rather_not))
        elif isinstance(action, DeleteRun | AbandonRun):
            path = run_path(Run(body, action.run, settings), ENGINES[action.engine])
            operations.append(Delete(path, children_first=isinstance(action, DeleteRun)))
        elif isinstance(action, MarkCheckpoint):
            operations += _mark(Run(body, action.run, settings), action)
        elif isinstance(action, HoldJob):
            operations.append(_hold(body["metadata"], action.hold))
        elif isinstance(action, DeleteJob):
            operations.append(Delete(job_path(body["metadata"]), body["metadata"]["uid"]))
    return operations


def _mark(run: Run, action: MarkCheckpoint) -> list[Annotate]:
    pods, _ = pods_query(run.namespace, run.job, run.number)
    paths = [run_path(run, ENGINES[action.engine])] if action.main else []
    return [Annotate(path, action.annotations) for path in (*paths, *(f"{pods}/{name}" for name in action.pods))]


def _hold(metadata: Json, hold: bool) -> SetFinalizers:
    others = [name for name in metadata.get("finalizers") or [] if name != names.FINALIZER]
    wanted = (*others, names.FINALIZER) if hold else tuple(others)
    return SetFinalizers(job_path(metadata), metadata["resourceVersion"], wanted)


def engine_for(run: Run) -> Engine:
    """What runs it: what is no attempt is a Job on every engine."""
    return engine_of(run.kubernetes.engine, run.settings) if run.is_attempt else indexed_job.ENGINE


def _start(run: Run) -> list[Operation]:
    """The main object last: it finds all that it needs, and its presence says that the attempt has begun.

    A Secret that it is to own can only come after it. The pods wait for the Secret.
    """
    engine = engine_for(run)
    main, support = engine.render(run), support_objects(run)
    later = [item for item in support if engine.needs_token_to_go and item["kind"] == "Secret"]
    before = [Create(_collection(item), item) for item in support if item not in later]
    after = [Create(_collection(item), item, with_run=True) for item in later]
    return [*before, Create(_collection(main), main, True), *after]


def owned_by(create: Create, main: Json) -> Create:
    """Return the operation with the run's main object, as the API server has it, as one more owner."""
    body = copy.deepcopy(create.body)
    owner = {"apiVersion": main["apiVersion"], "kind": main["kind"], **_identity(main)}
    body["metadata"]["ownerReferences"].append(owner | {"controller": False, "blockOwnerDeletion": False})
    return replace(create, body=body)


def _identity(body: Json) -> Json:
    return {name: body["metadata"][name] for name in ("name", "uid")}


def run_path(run: Run, engine: Engine) -> str:
    return f"/apis/{engine.group}/{engine.version}/namespaces/{run.namespace}/{engine.plural}/{run.name}"


def pods_query(namespace: str, job: str, run: int) -> tuple[str, str]:
    """Path and selector of a run's pods."""
    chosen = (f"{name}%3D{value}" for name, value in names.labels(job, run).items())
    return f"/api/v1/namespaces/{namespace}/pods", f"labelSelector={'%2C'.join(chosen)}"


def job_path(metadata: Json) -> str:
    return f"/apis/{GROUP}/{VERSION}/namespaces/{metadata['namespace']}/{PLURAL}/{metadata['name']}"


def patch_status(body: Json, status: Json) -> PatchStatus:
    """A merge patch that turns the status that stands into `status`: what is no longer there is set to null."""
    before = body.get("status") or {}
    changed: Json = {name: None for name in before if name not in status}
    news = {name: value for name, value in status.items() if before.get(name) != value}
    changed |= {name: _merge_value(before.get(name), value) for name, value in news.items()}
    metadata = body["metadata"]
    return PatchStatus(f"{job_path(metadata)}/status", metadata["uid"], metadata["resourceVersion"], changed)


def _merge_value(before: Any, value: Any) -> Any:
    """Merge patches merge mappings: what is gone from one must be said to be."""
    if isinstance(before, dict) and isinstance(value, dict):
        return {name: None for name in before if name not in value} | value
    return value


def event(body: Json, event: Event, now: datetime) -> Create:
    """A Kubernetes event about the job. Its name follows from what it says of which state of the job: an operator that
    ends before it has written the next state tells the same again, and it is there once."""
    metadata = body["metadata"]
    words = f"{metadata['uid']}/{metadata.get('resourceVersion')}/{event.type}/{event.reason}/{event.message}"
    item = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{metadata['name']}.{hashlib.sha256(words.encode()).hexdigest()[:16]}",
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
