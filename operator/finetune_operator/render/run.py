"""One run of a job: the input from which all of its objects are rendered."""

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
    """A run of a job. Attempts are numbered from 1; `names.PREFLIGHT_RUN` and `names.CLEANUP_RUN` are the helpers."""

    body: Json
    """The FineTuneJob."""
    number: int
    settings: Settings
    avoid: tuple[str, ...] = ()
    """Names of nodes that the pods must not run on."""
    rather_not: tuple[str, ...] = ()
    """Names of nodes that the pods run on only where no other node has room."""

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
        """Name of the Secret, the Service and the NetworkPolicy."""
        return names.support_name(self.job, self.number, self.uid, self.settings.token_key)

    @property
    def config(self) -> str:
        """Name of the ConfigMap."""
        return names.support_name(self.job, self.config_run.number, self.uid, self.settings.token_key, "config")

    @property
    def config_run(self) -> Run:
        """The run whose ConfigMap the pods mount: a preflight checks the configuration of the first attempt."""
        return replace(self, number=1) if self.number == names.PREFLIGHT_RUN else self

    @property
    def queue_labels(self) -> dict[str, str]:
        """Kueue's labels of the run. Preflights and clean-ups may have a queue of their own."""
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
        """Host memory in bytes that a node needs, from the plan of the preflight; None without a plan."""
        plan = (self.body.get("status") or {}).get("plan") or {}
        found = plan.get("hostBytes")
        return None if found is None else int(found)

    @property
    def nodes(self) -> int:
        """The largest number of pods."""
        return self.resources.max_nodes or self.resources.nodes or 1

    def metadata(self, name: str) -> Json:
        """Return the metadata of an object of the run. The job owns it, so that Kubernetes deletes it after the job."""
        owner = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": self.job,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": False,  # true needs the right to update the job's finalizers
        }
        labels = names.labels(self.job, self.number)
        return {"name": name, "namespace": self.namespace, "labels": labels, "ownerReferences": [owner]}
