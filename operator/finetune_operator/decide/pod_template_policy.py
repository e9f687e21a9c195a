"""What a job's pod template may ask for (pure): an allow-list, so that what Kubernetes learns next is refused too.

Whoever may make a FineTuneJob gets pods by it. They must get no more than pods: no way onto a node, no other service
account's rights. So the list is that of Kubernetes' Pod Security Standards, profile «restricted», less what the
operator sets itself; and the types are checked that rendering relies on. The API server checks the rest.
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
"""RDMA pins memory."""
_PROFILES = ("RuntimeDefault", "Localhost")
_SAFE_SYSCTLS = ("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports",
                 "net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range", "net.ipv4.tcp_fin_timeout",
                 "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_keepalive_time",
                 "net.ipv4.tcp_rmem", "net.ipv4.tcp_syncookies", "net.ipv4.tcp_wmem")  # fmt: skip
_OWN_MARKS = (f"{GROUP}/", "app.kubernetes.io/managed-by")
_OLD_PROFILES = ("container.apparmor.security.beta.kubernetes.io/", "container.seccomp.security.alpha.kubernetes.io/",
                 "seccomp.security.alpha.kubernetes.io/")  # fmt: skip
_PLAIN_LISTS = ("args", "command", "supplementalGroups")
_HANDLERS = ("livenessProbe", "readinessProbe", "startupProbe")


def template_faults(template: object, settings: Settings, engine_labels: tuple[str, ...]) -> Iterator[Problem]:
    """Yield what a pod template asks for beyond what a job may have.

    Args:
        engine_labels: prefixes of the labels and annotations that belong to the controllers of the engines.
    """
    if not isinstance(template, dict):
        yield Problem(TEMPLATE, "expected a PodTemplateSpec: metadata and spec")
        return
    yield from _closed(template, _TEMPLATE, TEMPLATE)
    metadata, spec = _part(template, "metadata"), _part(template, "spec")
    yield from _closed(metadata, _METADATA, f"{TEMPLATE}.metadata")
    yield from _marks(metadata, (*_OWN_MARKS, *engine_labels))
    where = f"{TEMPLATE}.spec"
    yield from _closed(spec, _POD, where)
    if spec.get("hostUsers"):
        yield Problem(f"{where}.hostUsers", "is true, only false is allowed")
    if str(spec.get("priorityClassName", "")).startswith("system-"):
        yield Problem(f"{where}.priorityClassName", "is for Kubernetes' own pods")
    yield from _accounts(spec, settings)
    yield from _volumes(spec, settings)
    context = _part(spec, "securityContext")
    yield from _closed(context, _POD_SECURITY, f"{where}.securityContext")
    yield from _security(context, f"{where}.securityContext")
    for kind in ("containers", "initContainers"):
        for place, container in _items(spec, kind, where):
            yield from _closed(container, _CONTAINER, place)
            yield from _container(container, place)


def _closed(value: Json, allowed: Mapping[str, type], where: str) -> Iterator[Problem]:
    """Fields that are not on the list, and those of another type."""
    for name, content in value.items():
        if name not in allowed:
            close = did_you_mean(name, allowed)
            yield Problem(f"{where}.{str(name)[:80]}", f"is not allowed: no field that a job may set{close}")
        elif content is not None and not isinstance(content, allowed[name]):
            yield Problem(f"{where}.{name}", f"is of type {type(content).__name__}, expected {allowed[name].__name__}")
        elif isinstance(content, list) and name not in _PLAIN_LISTS and not all(isinstance(x, dict) for x in content):
            yield Problem(f"{where}.{name}", "expected a list of mappings")


def _marks(metadata: Json, own: tuple[str, ...]) -> Iterator[Problem]:
    """Yield the labels and annotations by which the operator and the controllers of engines find their pods."""
    for kind in _METADATA:
        for name in _part(metadata, kind):
            refused = own if kind == "labels" else (*own, *_OLD_PROFILES)
            if str(name).startswith(refused):
                yield Problem(f"{TEMPLATE}.metadata.{kind}", f"{str(name)[:80]} is not allowed: a job may not set it")


def _accounts(spec: Json, settings: Settings) -> Iterator[Problem]:
    for name in ("serviceAccountName", "serviceAccount"):
        account = spec.get(name)
        if account and account != "default" and account not in settings.service_accounts:
            allowed = ", ".join(("default", *settings.service_accounts))
            yield Problem(f"{TEMPLATE}.spec.{name}", f"is {account!r}; this operator allows {allowed}")


def _volumes(spec: Json, settings: Settings) -> Iterator[Problem]:
    allowed = (*_VOLUMES, *_NODE_VOLUMES) if settings.allow_host_path else _VOLUMES
    for place, volume in _items(spec, "volumes", f"{TEMPLATE}.spec"):
        for kind in volume:
            if kind not in allowed:
                yield Problem(f"{place}.{kind}", "is not allowed by this operator")
        if str(volume.get("name", "")).startswith("finetune-"):
            yield Problem(f"{place}.name", "is not allowed: names that begin with finetune- are the operator's")


def _container(container: Json, where: str) -> Iterator[Problem]:
    yield from _closed(_part(container, "resources"), _RESOURCES, f"{where}.resources")
    for place, port in _items(container, "ports", where):
        for name in ("hostPort", "hostIP"):
            if port.get(name):
                yield Problem(f"{place}.{name}", "is not allowed: it is a port of the node")
    lifecycle = _part(container, "lifecycle")
    for name in _HANDLERS:
        yield from _handler(_part(container, name), f"{where}.{name}")
    for name in ("postStart", "preStop"):
        yield from _handler(_part(lifecycle, name), f"{where}.lifecycle.{name}")
    for place, item in _items(container, "env", where):
        name, value = str(item.get("name"))[:80], item.get("value")
        if isinstance(value, str) and is_credential(name, value):
            yield Problem(f"{place}.value", f"{name} is a secret: take it from a Secret, by valueFrom.secretKeyRef or "
                          "kubernetes.envFromSecrets")  # fmt: skip
    context, place = _part(container, "securityContext"), f"{where}.securityContext"
    yield from _closed(context, _CONTAINER_SECURITY, place)
    yield from _security(context, place)
    for name in ("privileged", "allowPrivilegeEscalation"):
        if context.get(name):
            yield Problem(f"{place}.{name}", "is not allowed")
    if context.get("procMount", "Default") != "Default":
        yield Problem(f"{place}.procMount", "is not allowed, only Default")
    added = _part(context, "capabilities").get("add") or []
    for capability in added if isinstance(added, list) else [added]:
        if capability not in _CAPABILITIES:
            yield Problem(f"{place}.capabilities.add", f"{capability} is not allowed, only IPC_LOCK")


def _handler(handler: Json, where: str) -> Iterator[Problem]:
    """The kubelet itself calls these, from the node's own network."""
    for kind in ("httpGet", "tcpSocket"):
        if _part(handler, kind).get("host"):
            yield Problem(f"{where}.{kind}.host", "is not allowed: only the pod itself can be asked")


def _security(context: Json, where: str) -> Iterator[Problem]:
    if context.get("runAsUser") == 0:
        yield Problem(f"{where}.runAsUser", "is 0: jobs don't run as root")
    if context.get("runAsNonRoot") is False:
        yield Problem(f"{where}.runAsNonRoot", "is false: jobs don't run as root")
    for name in ("seccompProfile", "appArmorProfile"):
        kind = _part(context, name).get("type", "RuntimeDefault")
        if kind not in _PROFILES:
            yield Problem(f"{where}.{name}.type", f"is {kind!r}, expected {' or '.join(_PROFILES)}")
    for name in _part(context, "seLinuxOptions"):
        if name != "level":
            yield Problem(f"{where}.seLinuxOptions.{name}", "is not allowed, only level")
    for place, sysctl in _items(context, "sysctls", where):
        if sysctl.get("name") not in _SAFE_SYSCTLS:
            yield Problem(f"{place}.name", f"{str(sysctl.get('name'))[:80]} is not allowed: no safe sysctl")


def texts_in(value: object) -> Iterable[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        yield from texts_in(item)


def _part(value: Json, name: str) -> Json:
    """A mapping in a mapping; empty where there is none, or where it is of another type."""
    part = value.get(name)
    return part if isinstance(part, dict) else {}


def _items(value: Json, name: str, where: str) -> Iterator[tuple[str, Json]]:
    """The mappings in a list, with their places."""
    found = value.get(name)
    for index, item in enumerate(found if isinstance(found, list) else []):
        if isinstance(item, dict):
            yield f"{where}.{name}[{index}]", item
