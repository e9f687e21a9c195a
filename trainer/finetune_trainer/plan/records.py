"""Records of plain values: the inputs of a plan, and the plan."""

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
    """Hardware and model configuration to plan a job for."""

    device: Device
    workers: int = 1
    """World size."""
    config: PretrainedConfig | None = None
    """Configuration of the model. Default: read from the job's model."""


@dataclass(frozen=True)
class StagePlan:
    """Resources of one stage. None means unknown before its data is read."""

    index: int
    title: str
    kind: str
    parameters: int
    trainable: int
    length: int
    """Tokens per row that memory is estimated for."""
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
    """Bytes left of `HEADROOM` of the device; negative if the stage does not fit."""
    advice: tuple[str, ...]
    """Changes to make if it does not fit."""
    notes: tuple[str, ...]
    """Assumptions, and reasons why values are unknown."""
    checkpoint: int = 0
    """Bytes of a checkpoint; 0 if the stage saves none."""
    comparison: tuple[Alternative, ...] = ()
    """Memory of other training methods (ESFT only)."""
    warnings: tuple[str, ...] = ()
    """Settings that waste memory or time. `finetune validate` prints them too."""
    host: HostMemory | None = None
    """Host memory of a node; None for a stage without training."""


@dataclass(frozen=True)
class TeacherPlan:
    """Resources of a teacher model on the job's own workers, each of which loads the whole model."""

    index: int
    """Index of its stage."""
    parameters: int
    length: int
    """Tokens of a prompt with its completion that memory is estimated for."""
    memory: Memory
    spare: int
    """Bytes left of `HEADROOM` of the device; negative if the teacher does not fit."""
    advice: tuple[str, ...] = ()
    """Changes to make if it does not fit."""

    @property
    def fits(self) -> bool:
        """Whether the teacher fits on the device."""
        return self.spare >= 0


@dataclass(frozen=True)
class JobPlan:
    """Resources of a job. Only stages that train or run a model have an entry."""

    name: str
    device: Device
    workers: int
    dtype: str
    peak: float | None
    """Peak FLOP/s of one device in that dtype, or None if unknown."""
    stages: tuple[StagePlan, ...]
    syntheses: tuple[SynthesisPlan, ...] = ()
    """Upper bounds of the requests of `synthesize` stages to their teachers."""
    teachers: tuple[TeacherPlan, ...] = ()
    """Teachers on the job's own workers, if their models are known."""

    @property
    def fits(self) -> bool:
        """Whether all stages and teachers fit on the device."""
        return all(stage.fits for stage in self.stages) and all(teacher.fits for teacher in self.teachers)

    @property
    def host_bytes(self) -> int | None:
        """Maximum host memory of a node over all stages, or None if no stage trains."""
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
