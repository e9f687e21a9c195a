"""The supporting objects of a run: ConfigMap, Secret, Service and NetworkPolicy."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from finetune_api.claims import claim_of, mounted
from finetune_api.job import API_VERSION, KIND
from finetune_api.report import PORT
from finetune_api.runconfig import RunConfig
from finetune_operator.core import names
from finetune_operator.render.run import Run

Json = dict[str, Any]


def token(key: bytes, uid: str, run: int) -> str:
    """Return the token of a run, for Ray's authentication and for the HTTP port of the report.

    It is derived from the operator's key (HMAC-SHA256), so that it is the same after a restart and the operator never
    has to read a Secret.
    """
    return hmac.new(key, f"{uid}/{run}".encode(), hashlib.sha256).hexdigest()


def run_config(run: Run) -> RunConfig:
    """Return the resolved job of an attempt."""
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
    """Return the directory of a job in storage. It has the namespace, so that two jobs of the same name differ."""
    storage = spec["storage"]
    base = mounted(storage.get("uri") or storage["path"])
    return f"{base.rstrip('/')}/{namespace}/{name}"


def claims(spec: Json) -> list[str]:
    """Return the PersistentVolumeClaims that `pvc://` URIs of the storage, the model and the data name."""
    uris = [spec["storage"].get("uri"), spec["model"].get("uri"), *_data_uris(spec["stages"])]
    return sorted({claim for uri in uris if uri and (claim := claim_of(uri))})


def _data_uris(stages: list[Json]) -> Iterator[str | None]:
    for part in (part for stage in stages for part in stage.values() if isinstance(part, dict)):
        for data in (part.get("data") or {}, part.get("evalData") or {}):
            yield from (source.get("uri") for source in data.get("sources") or [])


def config_map(run: Run, files: Mapping[str, str]) -> Json:
    """Return the ConfigMap with the RunConfig of an attempt. It is immutable, so that a running attempt never changes.

    It does not have the pod template, which only the operator needs and which may have values that not every reader of
    ConfigMaps may see.

    Args:
        run: the run.
        files: more files, with their content by name.
    """
    text = json.dumps(run_config(run).to_json(), ensure_ascii=False, separators=(",", ":"))  # the limit is 1 MiB
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": run.config_run.metadata(run.config),
        "immutable": True,
        "data": {names.CONFIG_FILE: text, **files},
    }


def secret(run: Run) -> Json:
    """Return the Secret with the token of an attempt."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": run.metadata(run.support),
        "immutable": True,
        "type": "Opaque",
        "stringData": {names.TOKEN_KEY: token(run.settings.token_key, run.uid, run.number)},
    }


def service(run: Run) -> Json:
    """Return the headless Service that gives the pods names.

    It publishes pods that are not ready, too: workers look the head up before any pod is ready.
    """
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


def network_policy(run: Run, ingress: Iterable[Json]) -> Json:
    """Return the NetworkPolicy that lets in the run's own pods, and the operator to the port of the report.

    Args:
        run: the attempt.
        ingress: more ingress rules, from the run's engine.
    """
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
            "ingress": [{"from": [own]}, {"from": [operator], "ports": [{"port": PORT}]}, *ingress],
        },
    }


def support_objects(run: Run, ingress: Iterable[Json], files: Mapping[str, str]) -> list[Json]:
    """Return the supporting objects of a run in the order of their creation.

    Preflights and clean-ups have no Ray cluster, so they need no Service, no token and no NetworkPolicy.

    Args:
        run: the run.
        ingress: more ingress rules of the NetworkPolicy, from the run's engine.
        files: more files of the ConfigMap, from the engine of the run that it is for (`Run.config_run`).
    """
    if not run.is_attempt:
        return [config_map(run, files)]
    policies = [network_policy(run, ingress)] if run.settings.network_policy else []
    checked = run.number == 1 and run.kubernetes.preflight  # the preflight has created the same ConfigMap
    config = [] if checked else [config_map(run, files)]
    return [*config, secret(run), service(run), *policies]
