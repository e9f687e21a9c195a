"""What every run needs beside its pods: its configuration, its token, its name in DNS, its walls."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator
from typing import Any

from finetune_api.claims import claim_of, mounted
from finetune_api.job import API_VERSION, KIND
from finetune_api.report import PORT
from finetune_api.runconfig import RunConfig
from finetune_operator import names
from finetune_operator.render.run import Run
from finetune_operator.settings import engine_name

Json = dict[str, Any]
DASHBOARD_PORT = 8265
SHELL = """# KubeRay's init container waits for the head by this, at a fifth of a CPU. The node does so by itself.
ray() { [ "$1" = health-check ] || command ray "$@"; }
"""


def token(key: bytes, uid: str, run: int) -> str:
    """A run's token: for Ray's own authentication and for the report's port.

    Derived (HMAC-SHA256 under the operator's key), so that it is the same after a restart and no Secret is ever read.
    """
    return hmac.new(key, f"{uid}/{run}".encode(), hashlib.sha256).hexdigest()


def run_config(run: Run) -> RunConfig:
    """The resolved job of one attempt."""
    metadata = {"name": run.job, "namespace": run.namespace}
    job = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": _without_template(run.spec)}
    return RunConfig.model_validate(
        {
            "job": job,
            "root": root(run.spec, run.namespace, run.job),
            "baseDir": "/",
            "cacheDir": f"{names.CACHE_DIRECTORY}/finetune",
            "attempt": max(run.number, 1),
        }
    )


def _without_template(spec: Json) -> Json:
    resources = {name: value for name, value in spec.get("resources", {}).items() if name != "podTemplate"}
    return {**spec, "resources": resources}


def root(spec: Json, namespace: str, name: str) -> str:
    """A job's directory in storage. The namespace is part of it, so that two jobs of one name never meet."""
    storage = spec["storage"]
    base = mounted(storage.get("uri") or storage["path"])
    return f"{base.rstrip('/')}/{namespace}/{name}"


def claims(spec: Json) -> list[str]:
    """PersistentVolumeClaims that `pvc://` URIs of the storage, the model and the data name."""
    uris = [spec["storage"].get("uri"), spec["model"].get("uri"), *_data_uris(spec["stages"])]
    return sorted({claim for uri in uris if uri and (claim := claim_of(uri))})


def _data_uris(stages: list[Json]) -> Iterator[str | None]:
    for part in (part for stage in stages for part in stage.values() if isinstance(part, dict)):
        for data in (part.get("data") or {}, part.get("evalData") or {}):
            yield from (source.get("uri") for source in data.get("sources") or [])


def config_map(run: Run) -> Json:
    """The attempt's RunConfig. Immutable: a running job never changes under its user.

    Without the pod template, which is for the operator alone and may hold values that not every reader of ConfigMaps
    should see.
    """
    shell = {names.SHELL_FILE: SHELL} if _kuberay(run) else {}
    text = json.dumps(run_config(run).to_json(), ensure_ascii=False, separators=(",", ":"))  # it may have 1 MiB
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": run.config_run.metadata(run.config),
        "immutable": True,
        "data": {names.CONFIG_FILE: text, **shell},
    }


def secret(run: Run) -> Json:
    """The attempt's token."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": run.metadata(run.support),
        "immutable": True,
        "type": "Opaque",
        "stringData": {names.TOKEN_KEY: token(run.settings.token_key, run.uid, run.number)},
    }


def service(run: Run) -> Json:
    """Names for the pods. Not-ready ones too: workers look for the head before anything is ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": run.metadata(run.support),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": names.labels(run.job, run.number),
            "ports": [{"name": "ray", "port": names.RAY_PORT}, {"name": "report", "port": PORT}],
        },
    }


def network_policy(run: Run) -> Json:
    """Only the run's own pods, and the operator for the report, get in."""
    own = {"podSelector": {"matchLabels": names.labels(run.job, run.number)}}
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": run.settings.operator_namespace}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": names.OPERATOR}},
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": run.metadata(run.support),
        "spec": {
            "podSelector": own["podSelector"],
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [own]}, {"from": [operator], "ports": [{"port": PORT}]}, *_for_kuberay(run)],
        },
    }


def _kuberay(run: Run) -> bool:
    return engine_name(run.kubernetes.engine, run.settings) == "kuberay"


def _for_kuberay(run: Run) -> list[Json]:
    """KubeRay's operator submits the driver at Ray's dashboard, whose token it has."""
    if not _kuberay(run):
        return []
    kuberay = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    return [{"from": [kuberay], "ports": [{"port": DASHBOARD_PORT}]}]


def support_objects(run: Run) -> list[Json]:
    """In the order of their making. What is no attempt has no Ray, so no name and no token."""
    if not run.is_attempt:
        return [config_map(run)]
    walls = [network_policy(run)] if run.settings.network_policy else []
    checked = run.number == 1 and run.kubernetes.preflight  # the preflight's own is there already
    config = [] if checked else [config_map(run)]
    return [*config, secret(run), service(run), *walls]
