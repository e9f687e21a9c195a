"""KubeRay's RayJob CRD as far as the API server needs it, because KubeRay itself is not available here.

The fields are those of the `ray.io/v1` types of KubeRay 1.7 (`apis/ray/v1/rayjob_types.go`, `raycluster_types.go`).
The objects are closed as KubeRay's are, so that strict field validation rejects an unknown field. Its pod templates are
open: the API server validates them as pods.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
NAME, CLUSTER_NAME = "rayjobs.ray.io", "rayclusters.ray.io"
TEXT, WHOLE, NUMBER, YES_NO = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))
OPAQUE: Json = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
TEXTS: Json = {"type": "object", "additionalProperties": TEXT}


def closed(required: tuple[str, ...] = (), **fields: Json) -> Json:
    """Return the schema of an object with only these fields."""
    return {"type": "object", "properties": fields, **({"required": list(required)} if required else {})}


def by_name(**fields: Json) -> Json:
    """Return the schema of a list with unique names, as in a pod template."""
    item = OPAQUE | {"properties": {"name": TEXT, **fields}, "required": ["name"]}
    return {"type": "array", "items": item, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}


CONTAINERS = by_name(env=by_name())
POD = OPAQUE | {"properties": {"containers": CONTAINERS, "initContainers": CONTAINERS}}
GROUP_FIELDS: Json = {
    "rayStartParams": TEXTS,
    "template": OPAQUE | {"properties": {"spec": POD}},
    "resources": OPAQUE,
    "labels": TEXTS,
}
HEAD = closed(("template",), serviceType=TEXT, headService=OPAQUE, enableIngress=YES_NO, **GROUP_FIELDS)
WORKERS = closed(
    ("groupName", "template", "minReplicas", "maxReplicas"),
    groupName=TEXT,
    replicas={**WHOLE, "default": 0},
    minReplicas={**WHOLE, "default": 0},
    maxReplicas={**WHOLE, "default": 2147483647},
    numOfHosts={**WHOLE, "default": 1},
    idleTimeoutSeconds=WHOLE,
    suspend=YES_NO,
    scaleStrategy=OPAQUE,
    **GROUP_FIELDS,
)
CLUSTER = closed(
    ("headGroupSpec",),
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
    rayVersion=TEXT,
    authOptions=closed(mode={**TEXT, "enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=YES_NO),
    enableInTreeAutoscaling=YES_NO,
    autoscalerOptions=OPAQUE,
    headServiceAnnotations=TEXTS,
    gcsFaultToleranceOptions=OPAQUE,
    managedBy=TEXT,
    suspend=YES_NO,
)
SPEC = closed(
    entrypoint=TEXT,
    submissionMode={**TEXT, "default": "K8sJobMode"},
    backoffLimit={**WHOLE, "default": 0},
    activeDeadlineSeconds=WHOLE,
    preRunningDeadlineSeconds=WHOLE,
    ttlSecondsAfterFinished={**WHOLE, "default": 0},
    shutdownAfterJobFinishes=YES_NO,
    deletionStrategy=OPAQUE,
    suspend=YES_NO,
    managedBy=TEXT,
    jobId=TEXT,
    metadata=TEXTS,
    runtimeEnvYAML=TEXT,
    clusterSelector=TEXTS,
    submitterPodTemplate=OPAQUE,
    submitterConfig=OPAQUE,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=TEXT,
    rayClusterSpec=CLUSTER,
)


def ray_job_crd() -> Json:
    """Return the CRD of RayJobs with KubeRay's names and an open status."""
    names = {"kind": "RayJob", "listKind": "RayJobList", "plural": "rayjobs", "singular": "rayjob"}
    return _crd(NAME, names, SPEC)


def ray_cluster_crd() -> Json:
    """Return the CRD of RayClusters, which the garbage collector needs for their owners."""
    names = {"kind": "RayCluster", "listKind": "RayClusterList", "plural": "rayclusters", "singular": "raycluster"}
    return _crd(CLUSTER_NAME, names, OPAQUE)


def _crd(name: str, names: Json, spec: Json) -> Json:
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "schema": {"openAPIV3Schema": closed(spec=spec, status=OPAQUE)},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": name},
        "spec": {"group": "ray.io", "names": names, "scope": "Namespaced", "versions": [version]},
    }
