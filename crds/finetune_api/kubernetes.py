"""Kubernetes settings of a job: engine, image, secrets and caches. `finetune run` ignores them."""

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


ONE_CACHE_FAULT = "set only one of modelCacheClaim and modelCacheHostPath"
SIZE_LIMIT_FAULT = "unset cacheSizeLimit, which limits emptyDir caches, or modelCacheClaim and modelCacheHostPath"


class Kubernetes(ApiModel):
    """Settings that apply on a cluster only. `finetune run` ignores them."""

    model_config = rules(
        cel("!has(self.modelCacheClaim) || !has(self.modelCacheHostPath)", ONE_CACHE_FAULT),
        cel(
            "!has(self.cacheSizeLimit) || (!has(self.modelCacheClaim) && !has(self.modelCacheHostPath))",
            SIZE_LIMIT_FAULT,
        ),
    )

    engine: Literal["auto", "job", "kuberay"] = "auto"
    """Engine that runs an attempt. `job`: an Indexed Job, available on any cluster. `kuberay`: a RayJob; needs KubeRay.
    `auto`: the default of the operator."""
    image: Image | None = None
    """Container image of the trainer. Default: the one that the operator is configured with."""
    preflight: bool = True
    """Check model, data, storage and memory in a pod without GPUs before any GPU is requested."""
    shared_memory: Quantity = "2Gi"
    """Size of /dev/shm. It counts towards the memory of the pod."""
    env_from_secrets: Annotated[list[ObjectName], Field(max_length=16)] = Field(default=[])
    """Secrets whose keys become environment variables of the trainer, such as `HF_TOKEN` or `AWS_ACCESS_KEY_ID`."""
    model_cache_claim: ObjectName | None = None
    """PersistentVolumeClaim for downloads and prepared data, shared by the nodes and attempts of a job and by other
    jobs. Default: an `emptyDir` volume, deleted with the pod."""
    model_cache_host_path: AbsolutePath | None = None
    """Directory on each node for downloads and prepared data, if the operator allows host paths. It must exist and be
    writable by the user of the pod (1000): a directory that Kubernetes creates belongs to root."""
    cache_size_limit: Quantity | None = None
    """Size limit of the `emptyDir` cache of an attempt (`emptyDir.sizeLimit`). Checkpoints are written to it before
    they are uploaded to a remote store. The pod also requests this much `ephemeral-storage`, so that it is scheduled to
    a node with enough disk space. Default: no limit and no request."""
    checkpoint_grace_seconds: Annotated[int, Field(ge=1, le=86400)] = 120
    """Seconds that a node has to save a checkpoint when it is stopped; the termination grace period of its pod.
    Preflight estimates how long a save takes, and warns if this value is too small."""

    def faults(self) -> Iterator[str]:
        if self.model_cache_claim is not None and self.model_cache_host_path is not None:
            yield ONE_CACHE_FAULT
        if self.cache_size_limit is not None and (self.model_cache_claim or self.model_cache_host_path):
            yield SIZE_LIMIT_FAULT
