"""What the API server cannot check of a job: rules of this operator, and storage that outlives a pod (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from finetune_api.job import API_VERSION, KIND
from finetune_api.problems import Problem
from finetune_api.validation import check_job
from finetune_operator.conditions import Reason
from finetune_operator.settings import Settings

Json = dict[str, Any]
_HOST_SWITCHES = ("hostNetwork", "hostPID", "hostIPC", "hostUsers", "shareProcessNamespace")
_CAPABILITIES = ("IPC_LOCK",)  # RDMA pins memory
_VOLUMES = ("persistentVolumeClaim", "emptyDir", "configMap", "secret", "projected", "csi", "ephemeral", "nfs",
            "downwardAPI", "image", "name")  # fmt: skip
TEMPLATE = "resources.podTemplate"


@dataclass(frozen=True)
class SpecFault:
    reason: Reason
    message: str


def spec_faults(body: Json, settings: Settings) -> SpecFault | None:
    """All that is wrong with a job, as one condition's reason and message."""
    metadata = {name: body["metadata"][name] for name in ("name", "namespace") if name in body["metadata"]}
    job, problems = check_job({"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": body["spec"]})
    if job is None or problems:
        return SpecFault(Reason.INVALID_SPEC, _words(problems))
    problems = [*_storage(body["spec"])]
    if problems:
        return SpecFault(Reason.INVALID_SPEC, _words(problems))
    template = body["spec"].get("resources", {}).get("podTemplate") or {}
    problems = [*_cache(body["spec"], settings), *template_faults(template, settings)]
    return SpecFault(Reason.POD_TEMPLATE_REFUSED, _words(problems)) if problems else None


def _words(problems: list[Problem]) -> str:
    return "; ".join(map(str, problems))[:4096]


def _storage(spec: Json) -> Iterator[Problem]:
    """A path must be on a volume: what a pod writes elsewhere is lost with it."""
    path = spec.get("storage", {}).get("path")
    if path is None:
        return
    where = PurePosixPath(path)
    if not where.is_absolute() or ".." in where.parts:
        yield Problem("storage.path", f"is {path!r}: on a cluster use storage.uri, or an absolute path on a volume")
        return
    mounts = [PurePosixPath(mount) for mount in _mount_paths(spec)]
    if not any(where.is_relative_to(mount) for mount in mounts):
        yield Problem("storage.path", f"is {path!r}, and no volume of {TEMPLATE} is mounted there: mount one, or set "
                      "storage.uri (`pvc://claim/path` mounts a claim by itself)")  # fmt: skip


def _cache(spec: Json, settings: Settings) -> Iterator[Problem]:
    if spec.get("kubernetes", {}).get("modelCacheHostPath") and not settings.allow_host_path:
        yield Problem("kubernetes.modelCacheHostPath", "is not allowed by this operator: use modelCacheClaim")


def _mount_paths(spec: Json) -> Iterator[str]:
    template = spec.get("resources", {}).get("podTemplate") or {}
    for container in _list((template.get("spec") or {}).get("containers")):
        for mount in _list(container.get("volumeMounts")):
            if isinstance(mount.get("mountPath"), str):
                yield mount["mountPath"]


def template_faults(template: Json, settings: Settings) -> Iterator[Problem]:
    """What a pod template asks for beyond what a job may have.

    Whoever may make a FineTuneJob gets pods by it; they must get no more than that: no way onto the node, no other
    service account's rights.
    """
    if not isinstance(template, dict) or not isinstance(template.get("spec") or {}, dict):
        yield Problem(TEMPLATE, "expected a PodTemplateSpec: metadata and spec")
        return
    spec: Json = template.get("spec") or {}
    for name in _HOST_SWITCHES:
        if spec.get(name):
            yield Problem(f"{TEMPLATE}.spec.{name}", "is not allowed")
    yield from _account_faults(spec, settings)
    yield from _volume_faults(spec, settings)
    for kind in ("containers", "initContainers", "ephemeralContainers"):
        for index, container in enumerate(_list(spec.get(kind))):
            yield from _container_faults(container, f"{TEMPLATE}.spec.{kind}[{index}]")


def _account_faults(spec: Json, settings: Settings) -> Iterator[Problem]:
    for name in ("serviceAccountName", "serviceAccount"):
        account = spec.get(name)
        if account and account != "default" and account not in settings.service_accounts:
            allowed = ", ".join(("default", *settings.service_accounts))
            yield Problem(f"{TEMPLATE}.spec.{name}", f"is {account!r}; this operator allows {allowed}")


def _volume_faults(spec: Json, settings: Settings) -> Iterator[Problem]:
    for index, volume in enumerate(_list(spec.get("volumes"))):
        for kind in volume:
            if kind in _VOLUMES or (kind == "hostPath" and settings.allow_host_path):
                continue
            yield Problem(f"{TEMPLATE}.spec.volumes[{index}].{kind}", "is not allowed by this operator")


def _container_faults(container: Json, where: str) -> Iterator[Problem]:
    context = container.get("securityContext")
    if not isinstance(context, dict):
        return
    for name in ("privileged", "allowPrivilegeEscalation"):
        if context.get(name):
            yield Problem(f"{where}.securityContext.{name}", "is not allowed")
    added = (context.get("capabilities") or {}).get("add") or []
    for capability in added:
        if capability not in _CAPABILITIES:
            yield Problem(f"{where}.securityContext.capabilities.add", f"{capability} is not allowed, only IPC_LOCK")


def _list(value: object) -> list[Json]:
    """The mappings in a list that a user may have written otherwise."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
