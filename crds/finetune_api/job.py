"""`FineTuneJob`, the custom resource: a pipeline of stages from a corpus to a preference-tuned model."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from finetune_api.base import ApiModel, cel, rules
from finetune_api.cluster import Resources, RunPolicy, Sharding, Storage
from finetune_api.model import ModelSpec
from finetune_api.stages import Stage

GROUP = "finetune.dev"
VERSION = "v1alpha1"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
SHORT_NAME = "ftj"
API_VERSION = f"{GROUP}/{VERSION}"
NAME_MAX = 40

JobName = Annotated[str, Field(max_length=NAME_MAX, pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$")]


class Metadata(ApiModel):
    """The part of Kubernetes' ObjectMeta that a job file uses."""

    name: JobName
    """Name of the job, also of its directory in storage."""
    namespace: Annotated[str, Field(max_length=63)] | None = None
    """Namespace on a cluster."""
    labels: dict[str, str] = {}
    """Labels on a cluster."""
    annotations: dict[str, str] = {}
    """Annotations on a cluster."""


class FineTuneJobSpec(ApiModel):
    """What a job trains, in which stages, on what."""

    model_config = rules(
        cel(
            "self.stages.all(s, !has(s.tokenizer)) || "
            "(has(self.stages[0].tokenizer) && self.stages.filter(s, has(s.tokenizer)).size() == 1)",
            "a tokenizer stage is the first one, and the only one of its kind",
        ),
        cel(
            "!has(self.stages[0].tokenizer) || has(self.model.config)",
            "a tokenizer stage needs model.config: a model that exists has a tokenizer of its own",
        ),
    )

    model: ModelSpec
    """The model that the first stage starts from."""
    stages: Annotated[list[Stage], Field(min_length=1, max_length=32)]
    """The pipeline, in order; each stage starts from the result of the one before it."""
    resources: Resources = Resources()
    """Nodes, GPUs, CPUs and memory."""
    sharding: Sharding = Sharding()
    """How the model is divided among the workers."""
    storage: Storage = Storage(path="runs")
    """Where checkpoints and results go."""
    run_policy: RunPolicy = RunPolicy()
    """Retries, deadline, suspension and clean-up."""

    @model_validator(mode="after")
    def _tokenizer_first(self) -> FineTuneJobSpec:
        where = [index for index, stage in enumerate(self.stages) if stage.tokenizer is not None]
        if where and where != [0]:
            raise ValueError("a tokenizer stage is the first one, and the only one of its kind")
        if where and self.model.config is None:
            raise ValueError("a tokenizer stage needs model.config: a model that exists has a tokenizer of its own")
        return self

    @model_validator(mode="after")
    def _distinct_names(self) -> FineTuneJobSpec:
        for name, count in Counter(stage.name for stage in self.stages if stage.name).items():
            if count > 1:
                raise ValueError(f"{count} stages are named {name!r}: a stage's name is its own")
        return self


class FineTuneJob(ApiModel):
    """A pipeline that trains a language model."""

    api_version: Literal["finetune.dev/v1alpha1"]
    """Group and version of the API."""
    kind: Literal["FineTuneJob"]
    """Kind of the resource."""
    metadata: Metadata
    """Name and labels."""
    spec: FineTuneJobSpec
    """What to train."""
    status: dict[str, Any] | None = None
    """Written by the operator; ignored in a job file."""


__all__ = ["API_VERSION", "GROUP", "KIND", "NAME_MAX", "PLURAL", "SHORT_NAME", "VERSION", "FineTuneJob", "FineTuneJobSpec"]
