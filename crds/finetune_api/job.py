"""`FineTuneJob`, the custom resource: a pipeline of training stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api.base import ApiModel, cel, expects, rules
from finetune_api.cluster import Resources, RunPolicy, Sharding, Storage
from finetune_api.kubernetes import Kubernetes
from finetune_api.model import ModelSpec
from finetune_api.problems import did_you_mean
from finetune_api.stages import BASE, Stage

GROUP = "finetune.dev"
VERSION = "v1alpha1"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
SHORT_NAME = "ftj"
API_VERSION = f"{GROUP}/{VERSION}"
NAME_MAX = 40
SYNTHESIZE = "synthesize"

NAME_PATTERN = r"^[a-z]([a-z0-9-]*[a-z0-9])?$"

JobName = Annotated[
    str,
    Field(
        max_length=NAME_MAX,
        pattern=NAME_PATTERN,
        json_schema_extra=expects(f"up to {NAME_MAX} lower-case letters, digits and inner dashes, a letter first"),
    ),
]


class Metadata(ApiModel):
    """The fields of Kubernetes' ObjectMeta that a job file can set."""

    name: JobName
    """Name of the job and of its directory in storage."""
    namespace: Annotated[str, Field(max_length=63)] | None = None
    """Namespace on a cluster."""
    labels: dict[str, str] = Field(default={})
    """Labels on a cluster."""
    annotations: dict[str, str] = Field(default={})
    """Annotations on a cluster."""


class FineTuneJobSpec(ApiModel):
    """Model, stages, resources and policies of a job."""

    model_config = rules(
        cel(
            "self.stages.all(s, !has(s.tokenizer)) || "
            "(has(self.stages[0].tokenizer) && self.stages.filter(s, has(s.tokenizer)).size() == 1)",
            "a tokenizer stage must be the first stage, and there can be only one",
        ),
        cel(
            "!has(self.stages[0].tokenizer) || has(self.model.config)",
            "a tokenizer stage needs model.config: an existing model already has a tokenizer",
        ),
        cel(
            "self.stages.filter(s, has(s.name)).all(s, self.stages.exists_one(t, has(t.name) && t.name == s.name))",
            "names of stages must be unique",
        ),
    )

    model: ModelSpec
    """The model that the first stage starts from."""
    stages: Annotated[list[Stage], Field(min_length=1, max_length=32)]
    """Stages of the pipeline, in order. Each stage starts from the result of the preceding one."""
    resources: Resources = Resources()
    """Nodes, GPUs, CPUs and memory."""
    sharding: Sharding = Sharding()
    """Sharding of the model across the workers."""
    storage: Storage = Storage(path="runs")
    """Storage of checkpoints and results."""
    run_policy: RunPolicy = RunPolicy()
    """Retries, timeouts, suspension and cleanup."""
    kubernetes: Kubernetes = Kubernetes()
    """Engine, image, secrets and caches on a cluster."""

    def faults(self) -> Iterator[str]:
        where = [index for index, stage in enumerate(self.stages) if stage.tokenizer is not None]
        if where and where != [0]:
            yield "a tokenizer stage must be the first stage, and there can be only one"
        if 0 in where and self.model.config is None:
            yield "a tokenizer stage needs model.config: an existing model already has a tokenizer"
        for name, count in Counter(stage.name for stage in self.stages if stage.name).items():
            if count > 1:
                yield f"{count} stages are named {name!r}: names of stages must be unique"
        yield from self._unknown_stages()
        yield from self._unknown_models()
        yield from self._unknown_reward_stages()

    def _unknown_stages(self) -> Iterator[str]:
        """Yield a fault for each data source that is not an earlier `synthesize` stage."""
        produces_data: dict[str, bool] = {}
        for index, stage in enumerate(self.stages):
            for path, name in stage.sources_from_stages():
                if not produces_data.get(name):
                    known = [title for title, produces in produces_data.items() if produces]
                    fault = "produces no data" if name in produces_data else "is not an earlier stage"
                    yield f"stages[{index}].{path}: {name!r} {fault}{did_you_mean(name, known)}"
            for kind in stage.kinds:
                produces_data[stage.name or kind] = getattr(stage, kind).produces == "data"

    def _unknown_models(self) -> Iterator[str]:
        """Yield a fault for each model of `compareWith` or of a teacher that no earlier stage produces.

        A comparison with the evaluated model itself is a fault too.
        """
        produces_model: dict[str, bool] = {}
        for index, stage in enumerate(self.stages):
            models = [BASE, *(title for title, produces in produces_model.items() if produces)]
            for position, name in enumerate(stage.evaluate.compare_with if stage.evaluate is not None else ()):
                path = f"stages[{index}].evaluate.compareWith[{position}]"
                if name == models[-1]:
                    yield f"{path}: {name!r} is the evaluated model itself: remove it"
                elif name not in models:
                    yield f"{path}: {name!r} {_no_model(name, produces_model)}{did_you_mean(name, models)}"
            teacher = stage.teacher_stage
            if teacher is not None and teacher not in models[1:]:
                path = f"stages[{index}].synthesize.teacher.model.stage"
                yield f"{path}: {teacher!r} {_no_model(teacher, produces_model)}{did_you_mean(teacher, models[1:])}"
            for kind in stage.kinds:
                produces_model[stage.name or kind] = getattr(stage, kind).produces == "model"

    def _unknown_reward_stages(self) -> Iterator[str]:
        """Yield a fault for each reference to a reward model that is not an earlier `reward` stage."""
        is_reward: dict[str, bool] = {}
        for index, stage in enumerate(self.stages):
            for path, name in stage.reward_stages():
                if not is_reward.get(name):
                    fault = "is not a reward stage" if name in is_reward else "is not an earlier stage"
                    hint = did_you_mean(name, [title for title, reward in is_reward.items() if reward])
                    yield f"stages[{index}].{path}: {name!r} {fault}{hint}"
            for kind in stage.kinds:
                is_reward[stage.name or kind] = getattr(stage, kind).produces == "rewardModel"


def _no_model(name: str, earlier: dict[str, bool]) -> str:
    return "produces no model" if name in earlier else "is not an earlier stage"


class FineTuneJob(ApiModel):
    """A pipeline of stages that trains a language model."""

    api_version: Literal["finetune.dev/v1alpha1"]
    """API group and version."""
    kind: Literal["FineTuneJob"]
    """Kind of the resource."""
    metadata: Metadata
    """Name, labels and annotations."""
    spec: FineTuneJobSpec
    """Model, stages, resources and policies of the job."""
    status: dict[str, Any] | None = None
    """Status of the job. The operator writes it; it is ignored in a job file."""


__all__ = [
    "API_VERSION",
    "GROUP",
    "KIND",
    "NAME_MAX",
    "NAME_PATTERN",
    "PLURAL",
    "SHORT_NAME",
    "VERSION",
    "FineTuneJob",
    "FineTuneJobSpec",
]
