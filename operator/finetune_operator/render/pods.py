"""The pod template of a run: the user's own, with the trainer's container, volumes and limits put in."""

from __future__ import annotations

import copy
from typing import Any

from finetune_api.report import NODE_VARIABLE, PORT
from finetune_operator.core import names
from finetune_operator.render import support
from finetune_operator.render.affinity import away_from, rather_away_from
from finetune_operator.render.run import Run

Json = dict[str, Any]
USER = 1000
GPU = "nvidia.com/gpu"
DISK = "ephemeral-storage"
NETWORKS = ("k8s.v1.cni.cncf.io/networks", "v1.multus-cni.io/default-network")
"""Annotations by which Multus gives a pod more networks."""
_AWAY_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
NODE_AWAY_SECONDS = 120
"""How long a node may not answer, from when Kubernetes has noticed (50 s), until its pods are given up. Kubernetes' own
default is 300: the GPUs of all other nodes would wait."""
_PLACES = ("kubernetes.io/", "topology.kubernetes.io/")
_TMP = "/tmp"
_CONTAINER_SECURITY: Json = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
_POD_SECURITY: Json = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}


def pod_template(run: Run, command: list[str], *, gpus: bool = True) -> Json:
    """A node's pod.

    Args:
        command: what the trainer's container runs.
        gpus: whether it takes the node's resources; a preflight takes its own small share.
    """
    template: Json = copy.deepcopy(run.spec.get("resources", {}).get("podTemplate") or {})
    metadata, spec = template.setdefault("metadata", {}), template.setdefault("spec", {})
    metadata["labels"] = {**_queue(metadata.get("labels") or {}), **names.labels(run.job, run.number)}
    spec.setdefault("restartPolicy", "Never")
    spec["restartPolicy"] = "Never"
    spec.setdefault("automountServiceAccountToken", False)
    spec.setdefault("enableServiceLinks", False)
    spec["terminationGracePeriodSeconds"] = run.kubernetes.checkpoint_grace_seconds
    spec["securityContext"] = _POD_SECURITY | (spec.get("securityContext") or {})
    spec["volumes"] = [*(spec.get("volumes") or []), *_volumes(run)]
    if spec.get("initContainers"):
        spec["initContainers"] = [_confined(item) for item in spec["initContainers"]]
    spec["containers"] = _containers(run, spec.get("containers") or [], command, gpus)
    if not gpus:
        _leave_accelerators(spec)
        _leave_networks(metadata)
    elif run.avoid or run.rather_not:
        kept = away_from(run.avoid, spec.get("affinity")) if run.avoid else spec.get("affinity")
        spec["affinity"] = rather_away_from(run.rather_not, kept)
    spec["tolerations"] = _tolerations(spec.get("tolerations") or [])
    return template


def _tolerations(given: list[Json]) -> list[Json]:
    """The user's, and for how long a node may be away, where they don't say."""
    covered = {item.get("key") for item in given if item.get("effect") in (None, "", "NoExecute")}
    own = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": NODE_AWAY_SECONDS}
    return [*given, *({"key": taint, **own} for taint in _AWAY_TAINTS if not covered & {None, "", taint})]


def _leave_accelerators(spec: Json) -> None:
    """A preflight takes no GPU and no GPU node: of what leads to one only what says which kind of machine, and where,
    stays. Nor does it wait for what lets attempts start."""
    for name in ("resources", "resourceClaims", "schedulingGates"):
        spec.pop(name, None)
    chosen = spec.pop("nodeSelector", None) or {}
    kept = {name: value for name, value in chosen.items() if name.startswith(_PLACES)}
    if kept:
        spec["nodeSelector"] = kept


def _leave_networks(metadata: Json) -> None:
    """A network attachment of RDMA adapters exists on GPU nodes alone, and takes a device there."""
    annotations = metadata.get("annotations")
    if isinstance(annotations, dict):
        metadata["annotations"] = {name: text for name, text in annotations.items() if name not in NETWORKS}


def _queue(labels: dict[str, str]) -> dict[str, str]:
    """Without the queue's label, which belongs on the run as a whole."""
    return {name: value for name, value in labels.items() if name != names.QUEUE_LABEL}


def _containers(run: Run, given: list[Json], command: list[str], gpus: bool) -> list[Json]:
    own = next((item for item in given if item.get("name") == names.CONTAINER), {})
    trainer = _trainer(run, own, command, gpus)
    others = [item for item in given if item.get("name") != names.CONTAINER]
    return [trainer, *(map(_confined, others) if gpus else [])]


def _security(given: Json) -> Json:
    """The trainer's own; a capability that the user adds (IPC_LOCK) does not bring back those that are dropped."""
    capabilities = _CONTAINER_SECURITY["capabilities"] | (given.get("capabilities") or {})
    return {**_CONTAINER_SECURITY, **given, "capabilities": capabilities}


def _confined(container: Json) -> Json:
    """A user's own container, without what Pod Security's «restricted» forbids."""
    given = container.get("securityContext") or {}
    drop = {"capabilities": {"drop": ["ALL"]} | (given.get("capabilities") or {})}
    return {**container, "securityContext": {"allowPrivilegeEscalation": False, **given, **drop}}


def _trainer(run: Run, own: Json, command: list[str], gpus: bool) -> Json:
    container = copy.deepcopy(own)
    container |= {
        "name": names.CONTAINER,
        "image": run.kubernetes.image or own.get("image") or run.settings.image,
        "imagePullPolicy": own.get("imagePullPolicy") or run.settings.image_pull_policy,
        "command": command,
        "args": [],
        "env": _env(run, own.get("env") or []),
        "envFrom": [
            *(own.get("envFrom") or []),
            *({"secretRef": {"name": name}} for name in run.kubernetes.env_from_secrets),
        ],
        "volumeMounts": [*(own.get("volumeMounts") or []), *_mounts(run)],
        "resources": _resources(run, own.get("resources") or {}, gpus),
        "securityContext": _security(own.get("securityContext") or {}),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if run.is_attempt:
        container["ports"] = [
            {"name": "ray", "containerPort": names.RAY_PORT},
            {"name": "report", "containerPort": PORT},
        ]
    return container


def _env(run: Run, given: list[Json]) -> list[Json]:
    """The user's, and then the operator's, which win."""
    own = {
        "HOME": _TMP,
        "HF_HOME": f"{names.CACHE_DIRECTORY}/huggingface",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
    }
    if run.is_attempt:
        address = names.pod_zero_address(run.job, run.number, run.support, run.namespace)
        own |= {
            "FINETUNE_HEAD_ADDRESS": f"{address}:{names.RAY_PORT}",
            "FINETUNE_TOKEN_FILE": f"{names.TOKEN_DIRECTORY}/{names.TOKEN_KEY}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": f"{names.TOKEN_DIRECTORY}/{names.TOKEN_KEY}",
        }
    own_list: list[Json] = [{"name": name, "value": value} for name, value in own.items()]
    own_list.append({"name": NODE_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}})
    names_of_own = {item["name"] for item in own_list}
    return [*(item for item in given if item.get("name") not in names_of_own), *own_list]


def _volumes(run: Run) -> list[Json]:
    kubernetes = run.kubernetes
    limit = kubernetes.cache_size_limit
    cache: Json = {"emptyDir": {"sizeLimit": limit} if limit else {}}
    if kubernetes.model_cache_claim:
        cache = {"persistentVolumeClaim": {"claimName": kubernetes.model_cache_claim}}
    elif kubernetes.model_cache_host_path:
        cache = {"hostPath": {"path": kubernetes.model_cache_host_path, "type": "Directory"}}
    volumes: list[Json] = [
        {"name": "finetune-config", "configMap": {"name": run.config}},
        {"name": "finetune-cache", **cache},
        {"name": "finetune-tmp", "emptyDir": {}},
        {"name": "finetune-shm", "emptyDir": {"medium": "Memory", "sizeLimit": kubernetes.shared_memory}},
    ]
    if run.is_attempt:
        secret = {"secretName": run.support, "defaultMode": 0o440}
        volumes.append({"name": "finetune-token", "secret": secret})
    for index, claim in enumerate(support.claims(run.spec)):
        volumes.append({"name": f"finetune-claim-{index}", "persistentVolumeClaim": {"claimName": claim}})
    return volumes


def _mounts(run: Run) -> list[Json]:
    mounts: list[Json] = [
        {"name": "finetune-config", "mountPath": names.CONFIG_DIRECTORY, "readOnly": True},
        {"name": "finetune-cache", "mountPath": names.CACHE_DIRECTORY},
        {"name": "finetune-tmp", "mountPath": _TMP},
        {"name": "finetune-shm", "mountPath": "/dev/shm"},
    ]
    if run.is_attempt:
        mounts.append({"name": "finetune-token", "mountPath": names.TOKEN_DIRECTORY, "readOnly": True})
    for index, claim in enumerate(support.claims(run.spec)):
        mounts.append({"name": f"finetune-claim-{index}", "mountPath": f"{names.CLAIM_DIRECTORY}/{claim}"})
    return mounts


def _resources(run: Run, given: Json, gpus: bool) -> Json:
    """Requests are limits where the job names an amount; what the template says otherwise (RDMA, …) stays.

    A pod with GPUs requests the host memory that the preflight planned, where the user names none: without a request it
    may land on a node whose memory other pods use. It is no limit, as it is an estimate.
    """
    if not gpus:
        own = {"cpu": run.settings.preflight_cpu, "memory": run.settings.preflight_memory}
        return {"requests": own, "limits": {"memory": own["memory"]}}
    wanted = run.resources
    amounts: dict[str, str] = {}
    if wanted.cpus_per_node:
        amounts["cpu"] = wanted.cpus_per_node
    if wanted.memory_per_node:
        amounts["memory"] = wanted.memory_per_node
    limits = {name: value for name, value in amounts.items() if name != "cpu"}  # a CPU limit only throttles
    if run.kubernetes.cache_size_limit and DISK not in (given.get("requests") or {}):
        amounts[DISK] = run.kubernetes.cache_size_limit
    if wanted.gpus_per_node:
        limits[GPU] = str(wanted.gpus_per_node)
    return {
        **given,
        "requests": {**_planned(run, given), **(given.get("requests") or {}), **amounts},
        "limits": {**(given.get("limits") or {}), **limits},
    }


def _planned(run: Run, given: Json) -> Json:
    """Return the planned memory request of a pod with GPUs whose template names no memory."""
    named = {**(given.get("requests") or {}), **(given.get("limits") or {})}
    if run.planned_host_bytes is None or not run.resources.gpus_per_node or "memory" in named:
        return {}
    return {"memory": f"{-(-run.planned_host_bytes // (1 << 20))}Mi"}
