"""Checks of a job that CRD validation cannot do: policies of this operator, and storage on a volume (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from finetune_api.job import API_VERSION, KIND
from finetune_api.problems import Problem
from finetune_api.validation import check_job
from finetune_operator.core.conditions import Reason
from finetune_operator.core.report_validation import clean
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import EngineFacts
from finetune_operator.decide.pod_template_policy import TEMPLATE, template_faults, texts_in

Json = dict[str, Any]
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
CLAIM_MAX = 253
MAX_TEMPLATE_PROBLEMS = 20
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class SpecFault:
    """Reason and message of the condition `Validated` of an invalid job."""

    reason: Reason
    message: str


def spec_faults(body: Json, settings: Settings, engines: EngineFacts) -> SpecFault | None:
    """Return all problems of a job as one condition's reason and message; None for a valid job."""
    metadata = {name: body["metadata"][name] for name in ("name", "namespace") if name in body["metadata"]}
    job, problems = check_job({"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": body["spec"]})
    if job is None or problems:
        return SpecFault(Reason.INVALID_SPEC, _message(problems))
    problems = [*_storage(body["spec"]), *_uris(body["spec"]), *engines.refusals]
    if problems:
        return SpecFault(Reason.INVALID_SPEC, _message(problems))
    template = body["spec"].get("resources", {}).get("podTemplate") or {}
    problems = [
        *_cache(body["spec"], settings),
        *_token_key(body, settings),
        *islice(template_faults(template, settings, engines.own_labels), MAX_TEMPLATE_PROBLEMS),
    ]
    return SpecFault(Reason.POD_TEMPLATE_REFUSED, _message(problems)) if problems else None


def _message(problems: list[Problem]) -> str:
    return clean("; ".join(map(str, problems))[:4096])


def _storage(spec: Json) -> Iterator[Problem]:
    """Check that the storage path is on a volume: files elsewhere are deleted with their pod."""
    path = spec.get("storage", {}).get("path")
    if path is None:
        return
    directory = PurePosixPath(path)
    if not directory.is_absolute() or ".." in directory.parts or _UNPRINTABLE.search(path):
        yield Problem("storage.path", f"is {path!r}: on a cluster use storage.uri, or an absolute path on a volume")
        return
    mounts = [PurePosixPath(mount) for mount in _mount_paths(spec)]
    if not any(directory.is_relative_to(mount) for mount in mounts):
        yield Problem("storage.path", f"is {path!r}, but no volume of {TEMPLATE} is mounted there: mount one, or set "
                      "storage.uri (`pvc://claim/path` mounts a claim by itself)")  # fmt: skip


def _uris(spec: Json) -> Iterator[Problem]:
    """Check that URIs have no `..` and no control characters, and that claims have valid names."""
    for field in ("storage", "model"):
        uri = spec[field].get("uri") or ""
        scheme, _, rest = uri.partition("://")
        if ".." in rest.split("/") or _UNPRINTABLE.search(uri):
            yield Problem(f"{field}.uri", f"is {uri[:200]!r}: expected no `..` and no control characters")
        elif scheme == "pvc" and not _is_claim(rest.partition("/")[0]):
            yield Problem(
                f"{field}.uri", f"is {uri[:200]!r}: expected the name of a PersistentVolumeClaim after pvc://"
            )


def _is_claim(name: str) -> bool:
    return len(name) <= CLAIM_MAX and _CLAIM.fullmatch(name) is not None


def _token_key(body: Json, settings: Settings) -> Iterator[Problem]:
    """Check that no job in the operator's namespace uses the token key's Secret: all jobs' tokens derive from it."""
    if body["metadata"].get("namespace") != settings.operator_namespace:
        return
    if settings.token_key_secret in texts_in([body["spec"].get("resources"), body["spec"].get("kubernetes")]):
        yield Problem(
            "",
            f"the Secret {settings.token_key_secret} is the operator's own: remove it from the spec",
        )


def _cache(spec: Json, settings: Settings) -> Iterator[Problem]:
    if spec.get("kubernetes", {}).get("modelCacheHostPath") and not settings.allow_host_path:
        yield Problem("kubernetes.modelCacheHostPath", "is not allowed by this operator: use modelCacheClaim")


def _mount_paths(spec: Json) -> Iterator[str]:
    template = (spec.get("resources", {}).get("podTemplate") or {}).get("spec")
    for container in _list(template.get("containers") if isinstance(template, dict) else None):
        for mount in _list(container.get("volumeMounts")):
            if isinstance(mount.get("mountPath"), str):
                yield mount["mountPath"]


def _list(value: object) -> list[Json]:
    """Return the mappings in a list; empty if the value is not a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
