"""How a job runs on Kubernetes: engine, image, secrets, caches. One machine ignores all of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel, cel, expects, rules
from finetune_api.cluster import Quantity

ObjectName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=253,
        pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$",
        json_schema_extra=expects("the name of an object in the job's namespace"),
    ),
]
Image = Annotated[
    str,
    Field(
        min_length=1,
        max_length=512,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$",
        json_schema_extra=expects("an image such as `ghcr.io/acme/trainer:1.2`"),
    ),
]

AbsolutePath = Annotated[
    str, Field(max_length=1024, pattern=r"^/", json_schema_extra=expects("an absolute path such as `/var/models`"))
]


class Kubernetes(ApiModel):
    """What a cluster needs to know beside the job itself. Ignored by `finetune run`."""

    model_config = rules(
        cel("!has(self.modelCacheClaim) || !has(self.modelCacheHostPath)", "set modelCacheClaim or modelCacheHostPath"),
        cel(
            "!has(self.cacheSizeLimit) || (!has(self.modelCacheClaim) && !has(self.modelCacheHostPath))",
            "cacheSizeLimit is for a cache of the attempt's own, without modelCacheClaim and modelCacheHostPath",
        ),
    )

    engine: Literal["auto", "job", "kuberay"] = "auto"
    """What runs an attempt. `job`: an Indexed Job, on any cluster. `kuberay`: a RayJob, where KubeRay is installed.
    `auto`: the operator's default."""
    image: Image | None = None
    """Image of the trainer. Default: the operator's."""
    preflight: bool = True
    """Check model, data, storage and memory in a pod without GPUs before any GPU is claimed."""
    shared_memory: Quantity = "2Gi"
    """Size of /dev/shm, which counts as the pod's memory."""
    env_from_secrets: Annotated[list[ObjectName], Field(max_length=16)] = Field(default=[])
    """Secrets whose keys become the trainer's environment, such as `HF_TOKEN` or `AWS_ACCESS_KEY_ID`."""
    model_cache_claim: ObjectName | None = None
    """PersistentVolumeClaim that keeps downloads and prepared data, shared by the nodes and attempts of a job and by
    other jobs. Default: each attempt has its own, lost with its pods."""
    model_cache_host_path: AbsolutePath | None = None
    """Directory of each node that keeps them instead, where the operator allows host paths. It is there already, and
    writable for the pod's user (1000): one that Kubernetes made would be root's."""
    cache_size_limit: Quantity | None = None
    """Size limit of the volume of downloads and prepared data where each attempt has its own (`emptyDir.sizeLimit`),
    which checkpoints pass through on their way to a remote store. It is also requested as `ephemeral-storage`, so that
    a node with that much room is chosen. Default: no limit and no request."""
    checkpoint_grace_seconds: Annotated[int, Field(ge=1, le=86400)] = 120
    """How long a node that is to stop may take to save a checkpoint; also its pod's termination grace period. Preflight
    says how long a save takes, and warns where this is less."""

    def faults(self) -> Iterator[str]:
        if self.model_cache_claim is not None and self.model_cache_host_path is not None:
            yield "set modelCacheClaim or modelCacheHostPath"
        if self.cache_size_limit is not None and (self.model_cache_claim or self.model_cache_host_path):
            yield "cacheSizeLimit is for a cache of the attempt's own, without modelCacheClaim and modelCacheHostPath"
