"""Policy for a job's pod template (pure): an allow-list, so that new fields of Kubernetes are refused too.

A user who may create a FineTuneJob gets pods through it, and must not get more than that: no access to a node, no
rights of another service account. The list follows the profile "restricted" of the Pod Security Standards, without the
fields that the operator sets itself. The types that rendering relies on are checked too; the API server checks the
rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from finetune_api.job import GROUP
from finetune_api.problems import Problem, did_you_mean
from finetune_api.redact import is_credential
from finetune_operator.core.settings import Settings

Json = dict[str, Any]
TEMPLATE = "resources.podTemplate"
_TEMPLATE = {"metadata": dict, "spec": dict}
_METADATA = {"labels": dict, "annotations": dict}
_POD = {
    **dict.fromkeys(("affinity", "dnsConfig", "nodeSelector", "resources", "securityContext"), dict),
    **dict.fromkeys(("containers", "hostAliases", "imagePullSecrets", "initContainers", "resourceClaims"), list),
    **dict.fromkeys(("schedulingGates", "tolerations", "topologySpreadConstraints", "volumes"), list),
    **dict.fromkeys(("dnsPolicy", "preemptionPolicy", "priorityClassName", "restartPolicy", "runtimeClassName"), str),
    **dict.fromkeys(("schedulerName", "serviceAccount", "serviceAccountName"), str),
    **dict.fromkeys(("automountServiceAccountToken", "enableServiceLinks", "hostUsers"), bool),
    "terminationGracePeriodSeconds": int,
}
_CONTAINER = {
    **dict.fromkeys(("lifecycle", "livenessProbe", "readinessProbe", "resources", "securityContext"), dict),
    **dict.fromkeys(("args", "command", "env", "envFrom", "ports", "resizePolicy", "volumeDevices"), list),
    **dict.fromkeys(("image", "imagePullPolicy", "name", "restartPolicy", "terminationMessagePath"), str),
    **dict.fromkeys(("terminationMessagePolicy", "workingDir"), str),
    **dict.fromkeys(("stdin", "stdinOnce", "tty"), bool),
    "startupProbe": dict,
    "volumeMounts": list,
}
_RESOURCES = {"claims": list, "limits": dict, "requests": dict}
_SECURITY = {
    **dict.fromkeys(("appArmorProfile", "seLinuxOptions", "seccompProfile"), dict),
    **dict.fromkeys(("runAsGroup", "runAsUser"), int),
    "runAsNonRoot": bool,
}
_POD_SECURITY = {
    **_SECURITY,
    **dict.fromkeys(("fsGroupChangePolicy", "seLinuxChangePolicy", "supplementalGroupsPolicy"), str),
    "fsGroup": int,
    "supplementalGroups": list,
    "sysctls": list,
}
_CONTAINER_SECURITY = {
    **_SECURITY,
    **dict.fromkeys(("allowPrivilegeEscalation", "privileged", "readOnlyRootFilesystem"), bool),
    "capabilities": dict,
    "procMount": str,
}
_VOLUMES = ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "name", "persistentVolumeClaim",
            "projected", "secret")  # fmt: skip
_NODE_VOLUMES = ("hostPath", "nfs")
_CAPABILITIES = ("IPC_LOCK",)
"""RDMA pins memory, which needs this capability."""
_PROFILES = ("RuntimeDefault", "Localhost")
_SAFE_SYSCTLS = ("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports",
                 "net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range", "net.ipv4.tcp_fin_timeout",
                 "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_keepalive_time",
                 "net.ipv4.tcp_rmem", "net.ipv4.tcp_syncookies", "net.ipv4.tcp_wmem")  # fmt: skip
_RESERVED = (f"{GROUP}/", "app.kubernetes.io/managed-by")
_OLD_PROFILES = ("container.apparmor.security.beta.kubernetes.io/", "container.seccomp.security.alpha.kubernetes.io/",
                 "seccomp.security.alpha.kubernetes.io/")  # fmt: skip
_PLAIN_LISTS = ("args", "command", "supplementalGroups")
_HANDLERS = ("livenessProbe", "readinessProbe", "startupProbe")


def template_faults(template: object, settings: Settings, engine_labels: tuple[str, ...]) -> Iterator[Problem]:
    """Yield a problem for each field or value of a pod template that a job may not set.

    Args:
        template: the pod template, of any type.
        settings: the operator's settings.
        engine_labels: prefixes of the labels and annotations that belong to the controllers of engines.
    """
    if not isinstance(template, dict):
        yield Problem(TEMPLATE, "expected a PodTemplateSpec: metadata and spec")
        return
    yield from _closed(template, _TEMPLATE, TEMPLATE)
    metadata, spec = _part(template, "metadata"), _part(template, "spec")
    yield from _closed(metadata, _METADATA, f"{TEMPLATE}.metadata")
    yield from _labels_and_annotations(metadata, (*_RESERVED, *engine_labels))
    path = f"{TEMPLATE}.spec"
    yield from _closed(spec, _POD, path)
    if spec.get("hostUsers"):
        yield Problem(f"{path}.hostUsers", "is true, only false is allowed")
    if str(spec.get("priorityClassName", "")).startswith("system-"):
        yield Problem(
            f"{path}.priorityClassName",
            "is reserved for Kubernetes' own pods: use another class",
        )
    yield from _accounts(spec, settings)
    yield from _volumes(spec, settings)
    context = _part(spec, "securityContext")
    yield from _closed(context, _POD_SECURITY, f"{path}.securityContext")
    yield from _security(context, f"{path}.securityContext")
    for kind in ("containers", "initContainers"):
        for item_path, container in _items(spec, kind, path):
            yield from _closed(container, _CONTAINER, item_path)
            yield from _container(container, item_path)


def _closed(value: Json, allowed: Mapping[str, type], path: str) -> Iterator[Problem]:
    """Yield the fields that are not in `allowed`, and those of another type."""
    for name, content in value.items():
        if name not in allowed:
            close = did_you_mean(name, allowed)
            yield Problem(f"{path}.{str(name)[:80]}", f"is not allowed: it is no field that a job may set{close}")
        elif content is not None and not isinstance(content, allowed[name]):
            yield Problem(f"{path}.{name}", f"is of type {type(content).__name__}, expected {allowed[name].__name__}")
        elif isinstance(content, list) and name not in _PLAIN_LISTS and not all(isinstance(x, dict) for x in content):
            yield Problem(f"{path}.{name}", "expected a list of mappings")


def _labels_and_annotations(metadata: Json, reserved: tuple[str, ...]) -> Iterator[Problem]:
    """Yield the labels and annotations by which the operator and the controllers of engines find their pods."""
    for kind in _METADATA:
        for name in _part(metadata, kind):
            refused = reserved if kind == "labels" else (*reserved, *_OLD_PROFILES)
            if str(name).startswith(refused):
                yield Problem(f"{TEMPLATE}.metadata.{kind}", f"{str(name)[:80]} is reserved: remove it")


def _accounts(spec: Json, settings: Settings) -> Iterator[Problem]:
    for name in ("serviceAccountName", "serviceAccount"):
        account = spec.get(name)
        if account and account != "default" and account not in settings.service_accounts:
            allowed = ", ".join(("default", *settings.service_accounts))
            yield Problem(f"{TEMPLATE}.spec.{name}", f"is {account!r}; this operator allows {allowed}")


def _volumes(spec: Json, settings: Settings) -> Iterator[Problem]:
    allowed = (*_VOLUMES, *_NODE_VOLUMES) if settings.allow_host_path else _VOLUMES
    for item_path, volume in _items(spec, "volumes", f"{TEMPLATE}.spec"):
        for kind in volume:
            if kind not in allowed:
                yield Problem(f"{item_path}.{kind}", "is not allowed by this operator")
        if str(volume.get("name", "")).startswith("finetune-"):
            yield Problem(f"{item_path}.name", "is not allowed: the prefix finetune- is reserved for the operator")


def _container(container: Json, path: str) -> Iterator[Problem]:
    yield from _closed(_part(container, "resources"), _RESOURCES, f"{path}.resources")
    for item_path, port in _items(container, "ports", path):
        for name in ("hostPort", "hostIP"):
            if port.get(name):
                yield Problem(f"{item_path}.{name}", "is not allowed: it is a port of the node")
    lifecycle = _part(container, "lifecycle")
    for name in _HANDLERS:
        yield from _handler(_part(container, name), f"{path}.{name}")
    for name in ("postStart", "preStop"):
        yield from _handler(_part(lifecycle, name), f"{path}.lifecycle.{name}")
    for item_path, item in _items(container, "env", path):
        name, value = str(item.get("name"))[:80], item.get("value")
        if isinstance(value, str) and is_credential(name, value):
            yield Problem(f"{item_path}.value", f"{name} is a credential: take it from a Secret, by "
                          "valueFrom.secretKeyRef or kubernetes.envFromSecrets")  # fmt: skip
    context, item_path = _part(container, "securityContext"), f"{path}.securityContext"
    yield from _closed(context, _CONTAINER_SECURITY, item_path)
    yield from _security(context, item_path)
    for name in ("privileged", "allowPrivilegeEscalation"):
        if context.get(name):
            yield Problem(f"{item_path}.{name}", "is not allowed")
    if context.get("procMount", "Default") != "Default":
        yield Problem(f"{item_path}.procMount", "is not allowed, only Default")
    added = _part(context, "capabilities").get("add") or []
    for capability in added if isinstance(added, list) else [added]:
        if capability not in _CAPABILITIES:
            yield Problem(f"{item_path}.capabilities.add", f"{capability} is not allowed, only IPC_LOCK")


def _handler(handler: Json, path: str) -> Iterator[Problem]:
    """Check a probe or hook: the kubelet sends its request from the node's network."""
    for kind in ("httpGet", "tcpSocket"):
        if _part(handler, kind).get("host"):
            yield Problem(f"{path}.{kind}.host", "is not allowed: requests go to the pod itself only")


def _security(context: Json, path: str) -> Iterator[Problem]:
    if context.get("runAsUser") == 0:
        yield Problem(f"{path}.runAsUser", "is 0: jobs may not run as root")
    if context.get("runAsNonRoot") is False:
        yield Problem(f"{path}.runAsNonRoot", "is false: jobs may not run as root")
    for name in ("seccompProfile", "appArmorProfile"):
        kind = _part(context, name).get("type", "RuntimeDefault")
        if kind not in _PROFILES:
            yield Problem(f"{path}.{name}.type", f"is {kind!r}, expected {' or '.join(_PROFILES)}")
    for name in _part(context, "seLinuxOptions"):
        if name != "level":
            yield Problem(f"{path}.seLinuxOptions.{name}", "is not allowed, only level")
    for item_path, sysctl in _items(context, "sysctls", path):
        if sysctl.get("name") not in _SAFE_SYSCTLS:
            yield Problem(f"{item_path}.name", f"{str(sysctl.get('name'))[:80]} is no safe sysctl: remove it")


def texts_in(value: object) -> Iterable[str]:
    """Yield every string in a JSON value."""
    if isinstance(value, str):
        yield value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        yield from texts_in(item)


def _part(value: Json, name: str) -> Json:
    """Return a mapping in a mapping; empty if it is missing or of another type."""
    part = value.get(name)
    return part if isinstance(part, dict) else {}


def _items(value: Json, name: str, path: str) -> Iterator[tuple[str, Json]]:
    """Yield the mappings in a list with their paths."""
    found = value.get(name)
    for index, item in enumerate(found if isinstance(found, list) else []):
        if isinstance(item, dict):
            yield f"{path}.{name}[{index}]", item
