"""`FineTuneJob`, the custom resource: a pipeline of stages from a corpus to a preference-tuned model."""

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
    """The part of Kubernetes' ObjectMeta that a job file uses."""

    name: JobName
    """Name of the job, also of its directory in storage."""
    namespace: Annotated[str, Field(max_length=63)] | None = None
    """Namespace on a cluster."""
    labels: dict[str, str] = Field(default={})
    """Labels on a cluster."""
    annotations: dict[str, str] = Field(default={})
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
        cel(
            "self.stages.filter(s, has(s.name)).all(s, self.stages.exists_one(t, has(t.name) && t.name == s.name))",
            "a stage's name is its own",
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
    kubernetes: Kubernetes = Kubernetes()
    """Engine, image, secrets and caches on a cluster."""

    def faults(self) -> Iterator[str]:
        where = [index for index, stage in enumerate(self.stages) if stage.tokenizer is not None]
        if where and where != [0]:
            yield "a tokenizer stage is the first one, and the only one of its kind"
        if 0 in where and self.model.config is None:
            yield "a tokenizer stage needs model.config: a model that exists has a tokenizer of its own"
        for name, count in Counter(stage.name for stage in self.stages if stage.name).items():
            if count > 1:
                yield f"{count} stages are named {name!r}: a stage's name is its own"
        yield from self._unknown_stages()
        yield from self._unknown_models()
        yield from self._unknown_reward_stages()

    def _unknown_stages(self) -> Iterator[str]:
        """Sources that are the data of a stage which isn't there, comes later or makes none."""
        made: dict[str, bool] = {}
        for index, stage in enumerate(self.stages):
            for place, name in stage.sources_from_stages():
                if not made.get(name):
                    makers = [title for title, makes in made.items() if makes]
                    what = "makes no data" if name in made else "is no stage before this one"
                    yield f"stages[{index}].{place}: {name!r} {what}{did_you_mean(name, makers)}"
            for kind in stage.kinds:
                made[stage.name or kind] = getattr(stage, kind).produces == "data"

    def _unknown_models(self) -> Iterator[str]:
        """Models to compare with, or to be taught by, that are no earlier stage's; or that are the evaluated one."""
        leaves_model: dict[str, bool] = {}
        for index, stage in enumerate(self.stages):
            models = [BASE, *(title for title, leaves in leaves_model.items() if leaves)]
            for at, name in enumerate(stage.evaluate.compare_with if stage.evaluate is not None else ()):
                where = f"stages[{index}].evaluate.compareWith[{at}]"
                if name == models[-1]:
                    yield f"{where}: {name!r} is the model that is evaluated"
                elif name not in models:
                    yield f"{where}: {name!r} {_no_model(name, leaves_model)}{did_you_mean(name, models)}"
            teacher = stage.teacher_stage
            if teacher is not None and teacher not in models[1:]:
                where = f"stages[{index}].synthesize.teacher.model.stage"
                yield f"{where}: {teacher!r} {_no_model(teacher, leaves_model)}{did_you_mean(teacher, models[1:])}"
            for kind in stage.kinds:
                leaves_model[stage.name or kind] = getattr(stage, kind).produces == "model"

    def _unknown_reward_stages(self) -> Iterator[str]:
        """Reward models that are no earlier `reward` stage's."""
        before: dict[str, bool] = {}
        for index, stage in enumerate(self.stages):
            for place, name in stage.reward_stages():
                if not before.get(name):
                    what = "is no reward stage" if name in before else "is no stage before this one"
                    hint = did_you_mean(name, [title for title, fits in before.items() if fits])
                    yield f"stages[{index}].{place}: {name!r} {what}{hint}"
            for kind in stage.kinds:
                before[stage.name or kind] = getattr(stage, kind).produces == "rewardModel"


def _no_model(name: str, before: dict[str, bool]) -> str:
    return "leaves no model" if name in before else "is no stage before this one"


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
