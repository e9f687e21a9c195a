"""One step of a pipeline: a member field for each kind of stage, exactly one of them set."""

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
"""Stages that train a model."""
StageSpec = TokenizerSpec | TrainedSpec | SynthesizeSpec | EvaluateSpec
DATA_FIELDS = ("data", "eval_data")
"""The fields of a spec that hold a `DataSpec`."""


class Stage(ApiModel):
    """One step of the pipeline: exactly one member field says which."""

    model_config = rules(exactly_one(*STAGE_KINDS))

    name: StageName | None = None
    """Name of the stage in status, logs and paths. Default: the member field's name."""
    tokenizer: TokenizerSpec | None = None
    """Train a tokenizer; the first stage."""
    pretrain: PretrainSpec | None = None
    """Train on plain text."""
    sft: SftSpec | None = None
    """Supervised fine-tuning."""
    esft: EsftSpec | None = None
    """Fine-tuning of the experts that the data uses."""
    dpo: DpoSpec | None = None
    """Preference tuning."""
    kto: KtoSpec | None = None
    """Preference tuning on single answers that are labelled good or bad."""
    evaluate: EvaluateSpec | None = None
    """Measure the model, and stop the job where it is not good enough."""
    reward: RewardSpec | None = None
    """A reward model from preference pairs."""
    rlhf: RlhfSpec | None = None
    """Reinforcement learning on rewards."""
    online: OnlineSpec | None = None
    """Rounds of preference tuning on the model's own answers."""
    synthesize: SynthesizeSpec | None = None
    """Make training data with a teacher."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *STAGE_KINDS)

    @property
    def kinds(self) -> list[str]:
        """The member fields that are set: one, in a stage without fault."""
        return [kind for kind in STAGE_KINDS if getattr(self, kind) is not None]

    @property
    def kind(self) -> str:
        """The member field that is set."""
        return self.kinds[0]

    @property
    def spec(self) -> StageSpec:
        """The member field's value."""
        spec: StageSpec = getattr(self, self.kind)
        return spec

    @property
    def title(self) -> str:
        """The stage's name, or its kind where it has none."""
        return self.name or self.kind

    def reward_stages(self) -> Iterator[tuple[str, str]]:
        """Each earlier stage whose reward model this one asks: the place below the stage, and that stage's name."""
        for kind in self.kinds:
            spec = getattr(self, kind)
            if isinstance(spec, PromptSpec):
                yield from ((f"{kind}.{place}", name) for place, name in spec.reward_stages())

    @property
    def teacher_stage(self) -> str | None:
        """The earlier stage whose model teaches this one."""
        model = getattr(getattr(self.synthesize, "teacher", None), "model", None)
        return getattr(model, "stage", None)

    def sources_from_stages(self) -> Iterator[tuple[str, str]]:
        """Each source that is an earlier stage's data: the source's place below the stage, and that stage's name."""
        for kind in self.kinds:
            spec = getattr(self, kind)
            for name in DATA_FIELDS:
                sources = getattr(getattr(spec, name, None), "sources", ())
                for index, source in enumerate(sources):
                    if source.stage is not None:
                        yield f"{kind}.{type(spec).model_fields[name].alias}.sources[{index}].stage", source.stage
