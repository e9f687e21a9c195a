"""The interface of an engine: everything that the rest of the operator knows about one.

An engine is a kind of Kubernetes object that runs attempts, such as a batch Job. The module of an engine has one
`Engine` and is registered by one line in `finetune_operator.engines`. All of its functions are pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.problems import Problem
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import PodNode, RunView
from finetune_operator.render.run import Run

Json = dict[str, Any]


def _without_limit(_: Settings) -> int:
    return 0


def _anything(_: Json) -> Iterable[Problem]:
    return ()


@dataclass(frozen=True)
class Engine:
    """A kind of object that runs attempts, and what its controller does with such an object.

    The operator creates one main object per attempt, named `Run.name`, and watches all objects of the kind that have
    its `managed-by` label.
    """

    name: str
    """Value of `kubernetes.engine` that requests this engine."""
    kind: str
    plural: str
    group: str
    """API group of the kind; empty for the core group. The engine is available where the cluster serves the kind."""
    version: str
    render: Callable[[Run], Json]
    """Return the manifest of the main object of a run."""
    observe: Callable[[Json], RunView | None]
    """Return the state of an object of the kind; None for an object that this operator does not manage."""
    locate: Callable[[Json], PodNode | None]
    """Return which node of its run a pod is, from the pod's metadata; None for a pod that another engine created.
    Node 0 has the driver."""
    own_labels: tuple[str, ...] = ()
    """Prefixes of the labels and annotations by which the engine's controller finds its pods. A job's pod template
    must not set them."""
    config_files: Mapping[str, str] = field(default_factory=dict)
    """More files of the ConfigMap that the pods mount at `names.CONFIG_DIRECTORY`, with their content by name."""
    ingress: tuple[Json, ...] = ()
    """Ingress rules of a NetworkPolicy: who may connect to the pods, other than the run's own pods and the operator."""
    create_failures: tuple[str, ...] = ()
    """Reasons of the warning events that say that pods of a run cannot be created."""
    start_seconds: Callable[[Settings], int] = _without_limit
    """Return how many seconds the engine's controller may take to start an attempt whose pods are ready; 0 is no
    limit."""
    refusals: Callable[[Json], Iterable[Problem]] = _anything
    """Return what a job's `spec` asks for that the engine cannot do."""
    remedy: str = ""
    """What to do where the cluster does not serve the kind."""
    runs_helpers: bool = False
    """Whether preflights and clean-ups run on this engine, whatever engine their job requests. One engine has it."""
    deletion_reads_secret: bool = False
    """Whether the engine's controller reads the run's Secret while the main object is deleted. The main object then
    owns the Secret too, so that Kubernetes deletes the Secret after it."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def api_path(self) -> str:
        """Path of the API group's version, which lists the resources that the cluster serves."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"

    def collection(self, namespace: str = "") -> str:
        """Return the path of the engine's objects in one namespace, or in all."""
        scope = f"/namespaces/{namespace}" if namespace else ""
        return f"{self.api_path}{scope}/{self.plural}"

    def made(self, body: Json) -> bool:
        """Whether an object is of this engine's kind."""
        return body.get("kind") == self.kind and body.get("apiVersion") == self.api_version
