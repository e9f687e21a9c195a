"""All that a stage's trainer is built from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerFast

from finetune_api.runconfig import RunConfig
from finetune_api.stages import PretrainSpec, TrainedSpec
from finetune_trainer.data import Prepared
from finetune_trainer.layout import StageLayout
from finetune_trainer.model.load import is_adapter
from finetune_trainer.model.precision import Precision, model_dtype, precision
from finetune_trainer.model.source import ModelSource


@dataclass(frozen=True)
class Placement:
    """Where this process stands among the workers."""

    rank: int
    local_rank: int
    world_size: int
    accelerator: bool


@dataclass(frozen=True)
class StageContext:
    """One trained stage on one worker."""

    run: RunConfig
    layout: StageLayout
    source: ModelSource
    tokenizer: PreTrainedTokenizerFast
    config: PretrainedConfig
    data: Prepared
    placement: Placement
    zero: int
    output_dir: Path

    @property
    def spec(self) -> TrainedSpec:
        """The stage's own part of the job."""
        spec = self.run.job.spec.stages[self.layout.index].spec
        assert not hasattr(spec, "vocab_size"), "a tokenizer stage trains no model"
        return spec  # type: ignore[return-value]

    @cached_property
    def precision(self) -> Precision:
        """The number formats of this stage."""
        dtype = model_dtype(self.run.job.spec.model.dtype, self.placement.accelerator)
        return precision(dtype, trains_base=self.trains_base, zero=self.zero)

    @property
    def trains_base(self) -> bool:
        """Whether every weight trains, and not adapters alone."""
        return isinstance(self.spec, PretrainSpec) or self.spec.lora is None

    @property
    def carries_adapter(self) -> bool:
        """Whether the stage before left an adapter that this one trains on."""
        return is_adapter(self.source.name)
