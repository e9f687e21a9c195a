"""One run of one job, with all that its objects are rendered from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from finetune_api.cluster import Resources
from finetune_api.job import API_VERSION, KIND
from finetune_api.kubernetes import Kubernetes
from finetune_operator.core import names
from finetune_operator.core.settings import Settings

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What rendering reads. Attempts have numbers from 1; see `names.PREFLIGHT_RUN`."""

    body: Json
    number: int
    settings: Settings
    avoid: tuple[str, ...] = ()
    """Names of nodes that its pods must not run on."""
    rather_not: tuple[str, ...] = ()
    """Names of nodes that its pods run on only where no other has room."""

    @property
    def is_attempt(self) -> bool:
        return self.number > 0

    @property
    def spec(self) -> Json:
        spec: Json = self.body["spec"]
        return spec

    @property
    def job(self) -> str:
        return str(self.body["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.body["metadata"]["namespace"])

    @property
    def uid(self) -> str:
        return str(self.body["metadata"]["uid"])

    @property
    def name(self) -> str:
        return names.run_name(self.job, self.number)

    @property
    def support(self) -> str:
        """Name of its Secret, Service and NetworkPolicy."""
        return names.support_name(self.job, self.number, self.uid, self.settings.token_key)

    @property
    def config(self) -> str:
        """Name of its ConfigMap."""
        return names.support_name(self.job, self.config_run.number, self.uid, self.settings.token_key, "config")

    @property
    def config_run(self) -> Run:
        """The run whose ConfigMap it reads: a preflight checks what the first attempt is going to do."""
        return replace(self, number=1) if self.number == names.PREFLIGHT_RUN else self

    @property
    def queue_labels(self) -> dict[str, str]:
        """Return what a queue knows the run by; preflight and clean-up may have a queue of their own."""
        labels = self.body["metadata"].get("labels") or {}
        found = {name: value for name, value in labels.items() if name.startswith(names.KUEUE)}
        if not self.is_attempt and self.settings.helper_queue:
            found[names.QUEUE_LABEL] = self.settings.helper_queue
        return found

    @property
    def resources(self) -> Resources:
        return Resources.model_validate(self.spec.get("resources", {}))

    @property
    def kubernetes(self) -> Kubernetes:
        return Kubernetes.model_validate(self.spec.get("kubernetes", {}))

    @property
    def planned_host_bytes(self) -> int | None:
        """Host memory that a node needs, as the preflight found."""
        plan = (self.body.get("status") or {}).get("plan") or {}
        found = plan.get("hostBytes")
        return None if found is None else int(found)

    @property
    def nodes(self) -> int:
        """Pods at most."""
        return self.resources.max_nodes or self.resources.nodes or 1

    def metadata(self, name: str) -> Json:
        """Metadata of one of its objects: owned by the job, so that it goes when the job does."""
        owner = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": self.job,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": False,  # true would need the right to change the job's finalizers
        }
        labels = names.labels(self.job, self.number)
        return {"name": name, "namespace": self.namespace, "labels": labels, "ownerReferences": [owner]}
