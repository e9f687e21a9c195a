"""The pod template of a run: the user's template plus the trainer's container, volumes and limits."""

from __future__ import annotations

import copy
from typing import Any

from finetune_api.report import NODE_VARIABLE, PORT
from finetune_operator.core import names
from finetune_operator.render import support
from finetune_operator.render.affinity import avoid_nodes, exclude_nodes
from finetune_operator.render.run import Run

Json = dict[str, Any]
RUN_CONFIG = f"{names.CONFIG_DIRECTORY}/{names.CONFIG_FILE}"
NODE_COMMAND = ["finetune", "node", "--run-config", RUN_CONFIG]
"""What each pod of an attempt runs."""
USER = 1000
GPU = "nvidia.com/gpu"
DISK = "ephemeral-storage"
NETWORKS = ("k8s.v1.cni.cncf.io/networks", "v1.multus-cni.io/default-network")
"""Annotations by which Multus attaches more networks to a pod."""
_AWAY_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
NODE_AWAY_SECONDS = 120
"""How long the pods of a node that does not answer are kept, counted from when Kubernetes notices it (50 s). Kubernetes
waits 300 s by default, in which the GPUs of all other nodes would be idle."""
_PLACEMENT_LABELS = ("kubernetes.io/", "topology.kubernetes.io/")
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
    """Return the template of a run's pods.

    Args:
        run: the run.
        command: the command of the trainer's container.
        gpus: whether a pod requests the GPUs, CPUs and memory of a node. The pod of a preflight or a clean-up requests
            only the small amounts of the settings.
    """
    template: Json = copy.deepcopy(run.spec.get("resources", {}).get("podTemplate") or {})
    metadata, spec = template.setdefault("metadata", {}), template.setdefault("spec", {})
    metadata["labels"] = {**_without_queue(metadata.get("labels") or {}), **names.labels(run.job, run.number)}
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
        _drop_accelerators(spec)
        _drop_networks(metadata)
    elif run.avoid or run.rather_not:
        affinity = exclude_nodes(run.avoid, spec.get("affinity")) if run.avoid else spec.get("affinity")
        spec["affinity"] = avoid_nodes(run.rather_not, affinity)
    spec["tolerations"] = _tolerations(spec.get("tolerations") or [])
    return template


def _tolerations(templated: list[Json]) -> list[Json]:
    """Return the template's tolerations, and the time that a node may be away where the template does not set it."""
    covered = {item.get("key") for item in templated if item.get("effect") in (None, "", "NoExecute")}
    own = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": NODE_AWAY_SECONDS}
    return [*templated, *({"key": taint, **own} for taint in _AWAY_TAINTS if not covered & {None, "", taint})]


def _drop_accelerators(spec: Json) -> None:
    """Remove what would place a preflight on a GPU node or delay it.

    Of the node selector, labels of the kind of machine and of its location stay.
    """
    for name in ("resources", "resourceClaims", "schedulingGates"):
        spec.pop(name, None)
    selector = spec.pop("nodeSelector", None) or {}
    kept = {name: value for name, value in selector.items() if name.startswith(_PLACEMENT_LABELS)}
    if kept:
        spec["nodeSelector"] = kept


def _drop_networks(metadata: Json) -> None:
    """Remove network attachments: those of RDMA adapters exist on GPU nodes only, and take a device there."""
    annotations = metadata.get("annotations")
    if isinstance(annotations, dict):
        metadata["annotations"] = {name: text for name, text in annotations.items() if name not in NETWORKS}


def _without_queue(labels: dict[str, str]) -> dict[str, str]:
    """Return the labels without the queue's, which belongs on the main object of the run."""
    return {name: value for name, value in labels.items() if name != names.QUEUE_LABEL}


def _containers(run: Run, templated: list[Json], command: list[str], gpus: bool) -> list[Json]:
    own = next((item for item in templated if item.get("name") == names.CONTAINER), {})
    trainer = _trainer(run, own, command, gpus)
    others = [item for item in templated if item.get("name") != names.CONTAINER]
    return [trainer, *(map(_confined, others) if gpus else [])]


def _security(templated: Json) -> Json:
    """Return the security context of the trainer. A user may add one capability (IPC_LOCK); all others are dropped."""
    capabilities = _CONTAINER_SECURITY["capabilities"] | (templated.get("capabilities") or {})
    return {**_CONTAINER_SECURITY, **templated, "capabilities": capabilities}


def _confined(container: Json) -> Json:
    """Return a container of the user's without what the Pod Security level "restricted" forbids."""
    context = container.get("securityContext") or {}
    drop = {"capabilities": {"drop": ["ALL"]} | (context.get("capabilities") or {})}
    return {**container, "securityContext": {"allowPrivilegeEscalation": False, **context, **drop}}


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


def _env(run: Run, templated: list[Json]) -> list[Json]:
    """Return the user's variables and the operator's, which replace those of the same name."""
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
    return [*(item for item in templated if item.get("name") not in names_of_own), *own_list]


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


def _resources(run: Run, templated: Json, gpus: bool) -> Json:
    """Return the requests and limits of the trainer. Other resources of the template, such as RDMA devices, stay.

    Amounts that the job names are requests and, except for CPUs, limits. A pod with GPUs whose job names no memory
    requests the host memory that the preflight planned: without a request the scheduler may choose a node whose memory
    other pods use. It is no limit, because it is an estimate.
    """
    if not gpus:
        own = {"cpu": run.settings.preflight_cpu, "memory": run.settings.preflight_memory}
        return {"requests": own, "limits": {"memory": own["memory"]}}
    requested = run.resources
    amounts: dict[str, str] = {}
    if requested.cpus_per_node:
        amounts["cpu"] = requested.cpus_per_node
    if requested.memory_per_node:
        amounts["memory"] = requested.memory_per_node
    limits = {name: value for name, value in amounts.items() if name != "cpu"}  # a CPU limit only throttles
    if run.kubernetes.cache_size_limit and DISK not in (templated.get("requests") or {}):
        amounts[DISK] = run.kubernetes.cache_size_limit
    if requested.gpus_per_node:
        limits[GPU] = str(requested.gpus_per_node)
    return {
        **templated,
        "requests": {**_planned(run, templated), **(templated.get("requests") or {}), **amounts},
        "limits": {**(templated.get("limits") or {}), **limits},
    }


def _planned(run: Run, templated: Json) -> Json:
    """Return the planned memory request of a pod with GPUs whose template names no memory."""
    named = {**(templated.get("requests") or {}), **(templated.get("limits") or {})}
    if run.planned_host_bytes is None or not run.resources.gpus_per_node or "memory" in named:
        return {}
    return {"memory": f"{-(-run.planned_host_bytes // (1 << 20))}Mi"}
