"""`Stage`: one step of the pipeline, with one field per kind of stage."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_api.base import ApiModel, exactly_one, not_exactly_one, rules
from finetune_api.data import StageName
from finetune_api.stages.corpus import PretrainSpec, TokenizerSpec
from finetune_api.stages.evaluation import EvaluateSpec
from finetune_api.stages.experts import EsftSpec
from finetune_api.stages.kto import KtoSpec
from finetune_api.stages.policy import OnlineSpec, PromptSpec, RlhfSpec
from finetune_api.stages.preference import DpoSpec, RewardSpec
from finetune_api.stages.supervised import SftSpec
from finetune_api.stages.synthesis import SynthesizeSpec

STAGE_KINDS = (
    "tokenizer",
    "pretrain",
    "sft",
    "esft",
    "dpo",
    "kto",
    "reward",
    "rlhf",
    "online",
    "synthesize",
    "evaluate",
)

TrainedSpec = PretrainSpec | SftSpec | EsftSpec | DpoSpec | KtoSpec | RewardSpec | RlhfSpec | OnlineSpec
"""Specs of stages that train a model."""
StageSpec = TokenizerSpec | TrainedSpec | SynthesizeSpec | EvaluateSpec
DATA_FIELDS = ("data", "eval_data")
"""Fields of a spec of type `DataSpec`."""


class Stage(ApiModel):
    """One step of the pipeline. Set exactly one field besides `name`; it selects the kind of stage."""

    model_config = rules(exactly_one(*STAGE_KINDS))

    name: StageName | None = None
    """Name of the stage in status, logs and paths. Default: the kind of the stage, such as `sft`."""
    tokenizer: TokenizerSpec | None = None
    """Train a tokenizer. Must be the first stage."""
    pretrain: PretrainSpec | None = None
    """Train on plain text."""
    sft: SftSpec | None = None
    """Supervised fine-tuning."""
    esft: EsftSpec | None = None
    """Expert-specialized fine-tuning of a mixture of experts."""
    dpo: DpoSpec | None = None
    """Direct preference optimization."""
    kto: KtoSpec | None = None
    """Preference tuning on single answers that are labelled good or bad."""
    evaluate: EvaluateSpec | None = None
    """Evaluate the model. A gate can stop the job."""
    reward: RewardSpec | None = None
    """Train a reward model on preference pairs."""
    rlhf: RlhfSpec | None = None
    """Reinforcement learning from rewards."""
    online: OnlineSpec | None = None
    """Rounds of DPO on completions of the model itself."""
    synthesize: SynthesizeSpec | None = None
    """Generate training data with a teacher."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *STAGE_KINDS)

    @property
    def kinds(self) -> list[str]:
        """The kinds that are set: exactly one in a valid stage."""
        return [kind for kind in STAGE_KINDS if getattr(self, kind) is not None]

    @property
    def kind(self) -> str:
        """The kind of the stage: the name of the field that is set."""
        return self.kinds[0]

    @property
    def spec(self) -> StageSpec:
        """The spec of the stage: the value of the field that is set."""
        spec: StageSpec = getattr(self, self.kind)
        return spec

    @property
    def title(self) -> str:
        """The name of the stage, or its kind if it has no name."""
        return self.name or self.kind

    def reward_stages(self) -> Iterator[tuple[str, str]]:
        """Yield the field path, relative to the stage, and the name of each earlier `reward` stage that is used."""
        for kind in self.kinds:
            spec = getattr(self, kind)
            if isinstance(spec, PromptSpec):
                yield from ((f"{kind}.{path}", name) for path, name in spec.reward_stages())

    @property
    def teacher_stage(self) -> str | None:
        """The name of the earlier stage whose model is the teacher, or None."""
        model = getattr(getattr(self.synthesize, "teacher", None), "model", None)
        return getattr(model, "stage", None)

    def sources_from_stages(self) -> Iterator[tuple[str, str]]:
        """Yield the field path and the stage name of each data source that is an earlier stage.

        Paths are relative to the stage.
        """
        for kind in self.kinds:
            spec = getattr(self, kind)
            for name in DATA_FIELDS:
                sources = getattr(getattr(spec, name, None), "sources", ())
                for index, source in enumerate(sources):
                    if source.stage is not None:
                        yield f"{kind}.{type(spec).model_fields[name].alias}.sources[{index}].stage", source.stage
