"""What a plan is made from, and what it says: plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PretrainedConfig

from finetune_trainer.plan.devices import Device
from finetune_trainer.plan.experts import Alternative
from finetune_trainer.plan.host import HostMemory
from finetune_trainer.plan.memory import Memory
from finetune_trainer.plan.steps import Steps

if TYPE_CHECKING:
    from finetune_trainer.synthesis.estimate import SynthesisPlan


class DataSize(NamedTuple):
    """Size of the training data of a stage."""

    rows: int
    """Number of training rows, after packing."""
    tokens: int
    """Number of tokens without padding."""
    longest: int | None = None
    """Number of tokens of the longest row."""


Rows = Callable[[int], DataSize | tuple[int, ...] | None]
"""Returns the data size of a stage by its index, as `DataSize` or a plain tuple, or None if it is not known."""


@dataclass(frozen=True)
class PlanContext:
    """What a job runs on. `workers` are all of them together."""

    device: Device
    workers: int = 1
    config: PretrainedConfig | None = None
    """The model's configuration. Default: the job's own, read from where its model is."""


@dataclass(frozen=True)
class StagePlan:
    """What one stage needs; None means: not known before its data is read."""

    index: int
    title: str
    kind: str
    parameters: int
    trainable: int
    length: int
    """Tokens per row that memory is counted for."""
    rows: int | None
    tokens: int | None
    tokens_per_step: int | None
    steps: Steps
    flops_per_token: float
    memory: Memory
    zero: int
    why: str
    """Reason for this ZeRO stage."""
    fits: bool
    spare: int
    """Bytes left of what may be filled; negative where it does not fit."""
    advice: tuple[str, ...]
    """Changes to make if it does not fit."""
    notes: tuple[str, ...]
    """Why something is not known."""
    checkpoint: int = 0
    """Bytes of a checkpoint; 0 where the stage saves none."""
    comparison: tuple[Alternative, ...] = ()
    """What other ways to train the same would need (ESFT)."""
    warnings: tuple[str, ...] = ()
    """What costs memory or time and need not. `finetune validate` prints them too."""
    host: HostMemory | None = None
    """Host memory of a node; None for a stage that only reads models."""


@dataclass(frozen=True)
class TeacherPlan:
    """What a model needs that makes data on the job's own workers, each of which holds all of it."""

    index: int
    """Of its stage."""
    parameters: int
    length: int
    """Tokens of a prompt with its answer that memory is counted for."""
    memory: Memory
    spare: int
    """Bytes left of what may be filled; negative where it does not fit."""
    advice: tuple[str, ...] = ()
    """Changes to make if it does not fit."""

    @property
    def fits(self) -> bool:
        """Whether the device holds it."""
        return self.spare >= 0


@dataclass(frozen=True)
class JobPlan:
    """What a job needs. Only the stages that train or read a model have an entry."""

    name: str
    device: Device
    workers: int
    dtype: str
    peak: float | None
    """FLOP/s of one device in that dtype, where known."""
    stages: tuple[StagePlan, ...]
    syntheses: tuple[SynthesisPlan, ...] = ()
    """What stages that make data will ask of their teachers at most."""
    teachers: tuple[TeacherPlan, ...] = ()
    """Teachers on the job's own workers, where their models are known."""

    @property
    def fits(self) -> bool:
        """Whether all stages and teachers fit on the device."""
        return all(stage.fits for stage in self.stages) and all(teacher.fits for teacher in self.teachers)

    @property
    def host_bytes(self) -> int | None:
        """Host memory of a node in the stage that needs most; None where no stage trains."""
        return max((stage.host.total for stage in self.stages if stage.host is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON, with `fits` and the total memory of each stage."""
        value = asdict(self) | {"fits": self.fits}
        plans: dict[str, tuple[StagePlan | TeacherPlan, ...]] = {"stages": self.stages, "teachers": self.teachers}
        for name, items in plans.items():
            for plain, item in zip(value[name], items, strict=True):
                plain["memory"]["total"] = item.memory.total
        for plain, stage in zip(value["stages"], self.stages, strict=True):
            if stage.host is not None:
                plain["host"]["total"] = stage.host.total
        return value
