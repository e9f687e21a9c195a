"""The context of a stage, from which its trainer is built."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from accelerate import PartialState  # type: ignore[import-untyped]  # it has no types
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from finetune_api.runconfig import RunConfig
from finetune_api.stages import Stage, TrainedSpec
from finetune_trainer.data import Prepared, StreamedRows
from finetune_trainer.layout import StageLayout
from finetune_trainer.model.load import JobModel
from finetune_trainer.model.precision import Precision, model_dtype, precision
from finetune_trainer.model.saved_model import is_adapter
from finetune_trainer.model.source import ModelSource
from finetune_trainer.stage_graph import place, spec_of
from finetune_trainer.training.batches import Division, Feed
from finetune_trainer.training.memory import Usage, usage
from finetune_trainer.training.prompt_feed import EvenDivision, PromptFeed


@dataclass(frozen=True)
class Placement:
    """The rank of this process and its device."""

    rank: int
    local_rank: int
    world_size: int
    accelerator: bool
    context_bytes: int = 0
    """Bytes of the device's context before the first collective: `training.memory.context_bytes`."""

    def usage(self) -> Usage:
        """Return the memory that this process has used in the stage."""
        return usage(self.accelerator, self.context_bytes)


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a stage resumes from."""

    step: int
    directory: Path
    universal: bool = False
    """Whether its DeepSpeed shards were converted to a universal checkpoint for another world size."""
    other_rows: bool = False
    """Whether the user resumes with training rows that differ from those of the checkpoint."""


@dataclass(frozen=True)
class StageContext:
    """A stage on one worker."""

    run: RunConfig
    layout: StageLayout
    source: ModelSource
    tokenizer: PreTrainedTokenizerFast
    config: PretrainedConfig
    prepared: Prepared | None
    """The stage's data as tokens; None for a stage without training data."""
    placement: Placement
    zero: int
    output_dir: Path
    rows_per_step: int
    """The global batch size, for any number of workers."""
    shards: int
    """Number of shards in which streamed data is read."""
    trained: int | None = None
    """Number of parameters with a gradient according to the plan; None if unknown."""
    resumed: ResumePoint | None = None

    @cached_property
    def spec(self) -> TrainedSpec:
        """The spec of the stage's kind."""
        # Stages that train nothing have specs of other classes, and read their fields themselves.
        return cast(TrainedSpec, spec_of(self.run, self.layout.index))

    @property
    def stage(self) -> Stage:
        """The stage as the job has it."""
        return self.run.job.spec.stages[self.layout.index]

    @property
    def job_model(self) -> JobModel:
        """The job's settings for loading saved models."""
        return JobModel(self.run.job.spec.model, self.tokenizer, self.run.cache_dir)

    @property
    def where(self) -> str:
        """The stage's path in the job, such as `stages[1].sft`."""
        return place(self.run, self.layout.index)

    @property
    def data(self) -> Prepared:
        """The stage's data as tokens."""
        assert self.prepared is not None
        return self.prepared

    @property
    def sample(self) -> Dataset:
        """The dataset that a trainer is created with: the training rows or, of a stream, its first row.

        TRL reads its columns, and takes only datasets of the `datasets` library.
        """
        rows = self.data.train
        return Dataset.from_list([next(iter(rows.shard(0, 1)))]) if isinstance(rows, StreamedRows) else rows

    @property
    def division(self) -> Division:
        """The share of each step's rows that this worker processes."""
        most, place = self.spec.per_device_train_batch_size, self.placement
        return Division(self.rows_per_step, most, place.world_size, place.rank)

    def feed(self) -> Feed:
        """Return the training rows, from the beginning or from the checkpoint that the stage resumes from."""
        seed = self.spec.seed
        if self.spec.generates:
            place = self.placement
            even = EvenDivision(self.rows_per_step, self.division.most, place.world_size, place.rank)
            repeats = getattr(self.spec, "num_iterations", 1)
            return PromptFeed(even, seed, repeats, self.resumed.directory if self.resumed else None)
        if self.resumed is None:
            return Feed(self.division, self.shards, seed)
        directory = None if self.resumed.other_rows else self.resumed.directory
        return Feed(self.division, self.shards, seed, self.resumed.step, directory)

    @cached_property
    def precision(self) -> Precision:
        """The number formats of this stage."""
        dtype = model_dtype(self.run.job.spec.model.dtype, self.placement.accelerator)
        return precision(dtype, trains_base=self.trains_base, zero=self.zero)

    @property
    def load_device(self) -> torch.device | None:
        """The device to which a saved model's weights are loaded; None if ZeRO-3 partitions them while loading.

        It is known once the stage's `TrainingArguments` are created.
        """
        if self.zero == 3 or not self.placement.accelerator:
            return None
        return torch.device(PartialState().device)

    @property
    def trains_base(self) -> bool:
        """Whether all weights are trained, not only an adapter or some experts."""
        return self.spec.updates == "weights"

    @property
    def carries_adapter(self) -> bool:
        """Whether the stage starts from an adapter that is not merged."""
        return is_adapter(self.source.name)
