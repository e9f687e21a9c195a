"""The part of KubeRay's RayJob that the API server must know: KubeRay itself can't be had here."""

from __future__ import annotations

from typing import Any

NAME = "rayjobs.ray.io"


def ray_job_crd() -> dict[str, Any]:
    """A CRD that takes any spec and any status, with KubeRay's own names."""
    opaque = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {"type": "object", "properties": {"spec": opaque, "status": opaque}}
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "schema": {"openAPIV3Schema": schema},
    }
    names = {"kind": "RayJob", "listKind": "RayJobList", "plural": "rayjobs", "singular": "rayjob"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": NAME},
        "spec": {"group": "ray.io", "names": names, "scope": "Namespaced", "versions": [version]},
    }
