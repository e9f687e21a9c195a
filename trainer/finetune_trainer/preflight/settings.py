"""Check the job itself, without model and data: the order of stages, and settings that conflict."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.stages import Stage
from finetune_api.training import Lora
from finetune_trainer.plan.workers import Workers
from finetune_trainer.stage_graph import place, stage_before


def setting_problems(run: RunConfig, workers: Workers) -> Iterator[Problem]:
    """Yield invalid orders of stages, adapters that a later stage cannot continue, and settings that need a GPU."""
    yield from _pipeline(run)
    yield from _cpu_limits(run, workers)


def is_masked(stage: Stage) -> bool:
    """Return whether the stage trains a masked language model."""
    return stage.spec.task == "masked"


def _pipeline(run: RunConfig) -> Iterator[Problem]:
    """Yield invalid orders of stages."""
    stages = run.job.spec.stages
    for index, stage in enumerate(stages):
        where = place(run, index)
        last = stage_before(run, index)
        before = None if last is None else stages[last]
        yield from _adapter_faults(run, stage, before, where)
        if before is not None and is_masked(before) and not is_masked(stage):
            yield Problem(where, "follows a masked language model, which can't generate: use objective causal there")


def _adapter_faults(run: RunConfig, stage: Stage, before: Stage | None, where: str) -> Iterator[Problem]:
    lora: Lora | None = getattr(stage.spec, "lora", None)
    untrained = run.job.spec.model.config is not None and (before is None or before.tokenizer is not None)
    if lora is not None and untrained:
        yield Problem(f"{where}.lora", "adapts a model that is built from scratch and never trained: pretrain it first")
    if stage.spec.trains and stage.spec.generates and lora is None and untrained:
        yield Problem(where, "asks a model for answers that is built from scratch and never trained: pretrain it first")
    if stage.esft is not None and untrained:
        yield Problem(where, "trains some experts of a model that is built from scratch and never trained: pretrain it")
    if before is None:
        return
    carried: Lora | None = getattr(before.spec, "lora", None)
    if stage.esft is not None and carried is not None and not carried.merge:
        yield Problem(where, f"starts from an adapter that is not merged: set lora.merge in {before.title}")
    if lora is None or carried is None or carried.merge or stage.spec.task == "reward":  # a reward stage merges it
        return
    for name in ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora"):
        if getattr(lora, name) != getattr(carried, name):
            message = f"is {getattr(lora, name)!r}, but the adapter carried on from {before.title} has "
            field = Lora.model_fields[name].alias
            message += f"{getattr(carried, name)!r}: set lora.merge there, or the same value here"
            yield Problem(f"{where}.lora.{field}", message)


def _cpu_limits(run: RunConfig, workers: Workers) -> Iterator[Problem]:
    """Refuse DoRA on 8-bit weights on CPUs: PEFT loses the scales of the layer at the first step (peft 0.21.2)."""
    for index, stage in enumerate([] if workers.accelerator else run.job.spec.stages):
        lora, quantization = (getattr(stage.spec, name, None) for name in ("lora", "quantization"))
        if lora is not None and lora.use_dora and quantization is not None and quantization.bits == 8:
            where = f"{place(run, index)}.lora.useDora"
            yield Problem(where, "DoRA on 8-bit weights needs a GPU: set quantization.bits to 4, or useDora to false")
