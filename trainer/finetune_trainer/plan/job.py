"""The plan of a whole job: one record per stage, made of plain values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from finetune_api.runconfig import RunConfig
from finetune_api.stages import (
    DpoSpec,
    EsftSpec,
    EvaluateSpec,
    OnlineSpec,
    PairSpec,
    PretrainSpec,
    PromptSpec,
    RewardSpec,
    RlhfSpec,
    Stage,
    SupervisedSpec,
    SynthesizeSpec,
    TokenizerSpec,
    TrainedSpec,
)
from finetune_api.training import Lora, TrainingSpec
from finetune_trainer.errors import UserError
from finetune_trainer.model.load import context_length, load_config, load_tokenizer
from finetune_trainer.model.source import stage_source
from finetune_trainer.model.task import task_of
from finetune_trainer.pipeline import place
from finetune_trainer.plan.advice import advise
from finetune_trainer.plan.answering import answering, trained_per_prompt
from finetune_trainer.plan.devices import Device, peak_flops
from finetune_trainer.plan.experts import Alternative, ExpertPlan, compare, expert_plan
from finetune_trainer.plan.inference import (
    check_reading,
    inference_memory,
    reading,
    reading_advice,
    reading_length,
)
from finetune_trainer.plan.memory import Memory, Workload, estimate, trainable, with_zero
from finetune_trainer.plan.model_size import AdapterSize, ModelSize, adapter_size, meta_model, model_size
from finetune_trainer.plan.sharding_choice import HEADROOM, choose_zero, sharding_problems, sharding_warnings
from finetune_trainer.plan.steps import Steps, count_steps, flops_per_token
from finetune_trainer.storage import Storage
from finetune_trainer.synthesis.estimate import SynthesisPlan, plan_synthesis


class DataSize(NamedTuple):
    """What preparation knows of a stage's training data."""

    rows: int
    """Rows to train on: packed ones where they are packed."""
    tokens: int
    """Tokens in them, padding left out."""
    longest: int | None = None
    """Tokens of the longest row."""


Rows = Callable[[int], tuple[int, ...] | None]
"""The data size of a stage by its index, as `DataSize` or a plain tuple; None where it is not known."""


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
    """Why this ZeRO stage."""
    fits: bool
    spare: int
    """Bytes left of what may be filled; negative where it does not fit."""
    advice: tuple[str, ...]
    """What to change where it does not fit."""
    notes: tuple[str, ...]
    """Warnings, and why something is not known."""
    comparison: tuple[Alternative, ...] = ()
    """What other ways to train the same would need (ESFT)."""


@dataclass(frozen=True)
class JobPlan:
    """What a job needs. Only the stages that train a model have an entry."""

    name: str
    device: Device
    workers: int
    dtype: str
    peak: float | None
    """FLOP/s of one device in that dtype, where known."""
    stages: tuple[StagePlan, ...]
    syntheses: tuple[SynthesisPlan, ...] = ()
    """What stages that make data will ask of their teachers at most."""

    @property
    def fits(self) -> bool:
        """Whether every stage fits the device."""
        return all(stage.fits for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, with `fits` and each stage's total memory."""
        value = asdict(self) | {"fits": self.fits}
        for plain, stage in zip(value["stages"], self.stages, strict=True):
            plain["memory"]["total"] = stage.memory.total
        return value


def plan_job(run: RunConfig, context: PlanContext, rows: Rows | None = None) -> JobPlan:
    """The plan of every trained stage of a job. Nothing is allocated but the plan.

    Args:
        rows: tells a stage's data size, which takes reading and tokenising; without it steps may be unknown.

    Raises:
        UserError: all faults that stand in the way together: a model that can't be built, an adapter that matches
            nothing, a sharding that can't work.
    """
    config = context.config or job_config(run)
    dtype = plan_dtype(run, context.device)
    stages, syntheses, problems = [], [], []
    for index, stage in enumerate(run.job.spec.stages):
        if isinstance(stage.spec, SynthesizeSpec) and not list(stage.sources_from_stages()):
            try:
                syntheses.append(_synthesis(run, index, stage.spec))
            except UserError as error:
                problems += error.problems
        if not isinstance(stage.spec, (TrainingSpec, EvaluateSpec)):
            continue
        planner = _StagePlanner(run, context, config, dtype, index, stage)
        try:
            spec = stage.spec
            stages.append(planner.evaluation(spec, rows) if isinstance(spec, EvaluateSpec) else planner.plan(rows))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    name = str(dtype).removeprefix("torch.")
    peak = peak_flops(context.device.name, dtype)
    return JobPlan(run.job.metadata.name, context.device, context.workers, name, peak, tuple(stages), tuple(syntheses))


def _synthesis(run: RunConfig, index: int, spec: SynthesizeSpec) -> SynthesisPlan:
    places = {"base_dir": Path(run.base_dir), "cache_dir": Path(run.cache_dir)}
    return plan_synthesis(spec, index, run.job.spec.stages[index].title, place(run, index), **places)


def job_config(run: RunConfig) -> PretrainedConfig:
    """The configuration of the job's model, with the vocabulary of the tokenizer it will have.

    Raises:
        UserError: as `load_config`.
    """
    source = stage_source(run, 0, Storage(run.root))
    tokenizer = load_tokenizer(source) if source.config is not None and source.tokenizer else None
    config = load_config(source, tokenizer)
    trained = run.job.spec.stages[0].tokenizer
    if trained is not None and "vocab_size" not in (source.config or {}):
        config.vocab_size = trained.vocab_size
    return config


def plan_dtype(run: RunConfig, device: Device) -> torch.dtype:
    """The dtype that the job's `model.dtype` means on a device, which need not be this machine's."""
    named = run.job.spec.model.dtype
    if named != "auto":
        dtype = getattr(torch, named)
        assert isinstance(dtype, torch.dtype)
        return dtype
    known = peak_flops(device.name, torch.float32) is not None
    has_bfloat16 = not known or peak_flops(device.name, torch.bfloat16) is not None
    return torch.bfloat16 if device.kind == "cuda" and has_bfloat16 else torch.float32


@dataclass(frozen=True)
class _StagePlanner:
    run: RunConfig
    context: PlanContext
    config: PretrainedConfig
    dtype: torch.dtype
    index: int
    stage: Stage

    def plan(self, rows: Rows | None) -> StagePlan:
        spec, sharding = self.spec, self.run.job.spec.sharding
        found = sharding_problems(sharding, self.bits)
        model = meta_model(self.config, task_of(spec))
        size, adapter = model_size(model), None
        try:
            adapter = self.adapter() if _lora(spec) is not None else None
        except UserError as error:
            found += error.problems
        if found:
            raise UserError(found)
        data = rows(self.index) if rows is not None else None
        known = None if data is None else DataSize(*data)
        length, notes = self.length(known)
        load = self.load(length, adapter, eager=self._eager(model))
        if isinstance(spec, PromptSpec):
            load, more = answering(load, spec, self.run, self.config)
            notes = [*notes, *more]
        experts = expert_plan(spec, model, self.path, self.run.base_dir) if isinstance(spec, EsftSpec) else None
        if experts is not None:
            load, notes = replace(load, tuned=experts.tuned), [*notes, *experts.notes]
        return self.assemble(size, load, known, [*notes, *sharding_warnings(sharding, self.bits)], experts)

    def evaluation(self, spec: EvaluateSpec, rows: Rows | None) -> StagePlan:
        """The plan of a stage that only reads models, one after the other, each worker all of each."""
        check_reading(spec, self.config, self.path)
        size, device, workers = model_size(meta_model(self.config)), self.context.device, self.context.workers
        data = rows(self.index) if rows is not None else None
        known = None if data is None else DataSize(*data)
        length = reading_length(spec, self.config, known.longest if known else None)
        load = reading(spec, length, self.dtype.itemsize, device.kind)
        memory, limit = inference_memory(size, load), round(HEADROOM * device.memory_bytes)
        per_step = spec.per_device_eval_batch_size * workers
        models = 1 + len(set(spec.compare_with))
        batches = None if known is None else math.ceil(known.rows / per_step)
        spare = limit - memory.total
        return StagePlan(
            index=self.index,
            title=self.stage.title,
            kind=self.stage.kind,
            parameters=size.total,
            trainable=0,
            length=length,
            rows=known.rows if known else None,
            tokens=known.tokens if known else None,
            tokens_per_step=None,
            steps=Steps(None if batches is None else batches * models, batches, 0, per_step),
            flops_per_token=flops_per_token(size, length) / 3,
            memory=memory,
            zero=0,
            why="each worker holds the whole model",
            fits=spare >= 0,
            spare=spare,
            advice=() if spare >= 0 else tuple(reading_advice(size, load, self.path, limit)),
            notes=(f"measures {models} model{'s, one after the other' if models > 1 else ''}",),
        )

    def assemble(
        self, size: ModelSize, load: Workload, data: DataSize | None, notes: list[str], experts: ExpertPlan | None
    ) -> StagePlan:
        spec, device = self.spec, self.context.device
        zero, why = choose_zero(
            self.run.job.spec.sharding,
            lambda stage: estimate(size, with_zero(load, stage)),
            load.workers,
            device.memory_bytes,
            self.bits,
        )
        load = with_zero(load, zero)
        memory = estimate(size, load)
        spare = round(HEADROOM * device.memory_bytes) - memory.total
        steps = count_steps(spec, data.rows if data else None, load.workers)
        fix = partial(advise, size, load, spec, self.path, round(HEADROOM * device.memory_bytes), self._spare_adapter)
        adapter_parameters = load.adapter.parameters if load.adapter else None
        has_reference = _has_reference(spec)
        if experts is None:
            flops = flops_per_token(size, load.length, adapter_parameters, reference=has_reference)
        else:
            flops = flops_per_token(size, load.length, 0) + 2 * experts.active
        return StagePlan(
            index=self.index,
            title=self.stage.title,
            kind=self.stage.kind,
            parameters=size.total + (adapter_parameters or 0),
            trainable=trainable(size, load),
            length=load.length,
            rows=data.rows if data else None,
            tokens=data.tokens if data else None,
            tokens_per_step=_tokens_per_step(spec, steps, load.length, data),
            steps=steps,
            flops_per_token=flops,
            memory=memory,
            zero=zero,
            why=why,
            fits=spare >= 0,
            spare=spare,
            advice=() if spare >= 0 else tuple(fix()),
            notes=(*notes, *_unknown(steps, data)),
            comparison=() if experts is None or not experts.tuned else compare(size, load, self._spare_adapter()),
        )

    def load(self, length: int, adapter: AdapterSize | None, eager: bool) -> Workload:
        spec, sharding = self.spec, self.run.job.spec.sharding
        quantization = getattr(spec, "quantization", None)
        return Workload(
            batch=_sequences(spec),
            length=length,
            dtype_bytes=self.dtype.itemsize,
            workers=self.context.workers,
            adapter=adapter,
            quantized_bits=self.bits,
            double_quant=quantization is None or quantization.double_quant,
            checkpointing=spec.gradient_checkpointing,
            eager=eager,
            full_logits=_is_masked(spec),
            no_logits=isinstance(spec, RewardSpec),
            reference=_second_model(spec),
            offload_optimizer=sharding.offload_optimizer,
            offload_param=sharding.offload_param,
            kind=self.context.device.kind,
        )

    def length(self, data: DataSize | None) -> tuple[int, list[str]]:
        """Tokens per row, and a note where that is only the model's context."""
        spec = self.spec
        if isinstance(spec, PretrainSpec):
            return spec.block_size, []
        if isinstance(spec, SupervisedSpec) and spec.packing:
            assert spec.max_length is not None
            return spec.max_length, []
        if isinstance(spec, PromptSpec):
            return self._answered_length(spec, data)
        longest = data.longest if data else None
        limits = [limit for limit in (spec.max_length, longest, context_length(self.config)) if limit]
        length = min(limits, default=1024)
        if spec.max_length or longest:
            return length, []
        return length, [f"the longest example is not known: memory is for the model's context, {length} tokens"]

    def _answered_length(self, spec: PromptSpec, data: DataSize | None) -> tuple[int, list[str]]:
        """Tokens of the longest prompt with the longest answer."""
        answer, context = spec.generation.max_new_tokens, context_length(self.config)
        prompts = [limit for limit in (spec.max_prompt_length, data.longest if data else None) if limit]
        if prompts:
            return min([min(prompts) + answer, *([context] if context else [])]), []
        length = context or 1024
        return length, [f"the longest prompt is not known: memory is for the model's context, {length} tokens"]

    def adapter(self) -> AdapterSize:
        lora = _lora(self.spec)
        assert lora is not None
        return adapter_size(meta_model(self.config, task_of(self.spec)), lora, f"{self.path}.lora")

    def _spare_adapter(self) -> AdapterSize:
        """The size of a default adapter, for advice."""
        return adapter_size(meta_model(self.config, task_of(self.spec)), Lora())

    def _eager(self, model: Any) -> bool:
        asked = self.run.job.spec.model.attn_implementation
        return asked == "eager" or (asked == "auto" and model.config._attn_implementation == "eager")

    @property
    def spec(self) -> TrainedSpec:
        spec = self.stage.spec
        assert not isinstance(spec, (TokenizerSpec, EvaluateSpec))
        return spec

    @property
    def path(self) -> str:
        return place(self.run, self.index)

    @property
    def bits(self) -> int | None:
        quantization = getattr(self.spec, "quantization", None)
        return None if quantization is None else quantization.bits


def _lora(spec: TrainedSpec) -> Lora | None:
    return getattr(spec, "lora", None)


def _is_masked(spec: TrainedSpec) -> bool:
    return isinstance(spec, PretrainSpec) and spec.objective == "masked"


def _sequences(spec: TrainedSpec) -> int:
    """Sequences in one forward pass of a worker."""
    if isinstance(spec, PromptSpec):
        return spec.per_device_train_batch_size * trained_per_prompt(spec)
    return spec.per_device_train_batch_size * (2 if isinstance(spec, PairSpec) else 1)


def _has_reference(spec: TrainedSpec) -> bool:
    """Whether each token costs a forward pass of a reference too."""
    if isinstance(spec, RlhfSpec):
        return spec.beta > 0
    return isinstance(spec, DpoSpec) and spec.reference != "precomputed"


def _second_model(spec: TrainedSpec) -> bool:
    if isinstance(spec, RlhfSpec):
        return spec.beta > 0 and spec.lora is None
    if isinstance(spec, OnlineSpec):
        return spec.reference == "start" and spec.lora is None
    if not isinstance(spec, DpoSpec):
        return False
    return spec.reference == "model" or (spec.reference == "auto" and spec.lora is None)


def _tokens_per_step(spec: TrainedSpec, steps: Steps, length: int, data: DataSize | None) -> int | None:
    if isinstance(spec, PromptSpec):
        return steps.rows_per_step * trained_per_prompt(spec) * length
    if data is not None and data.rows:
        return round(data.tokens / data.rows * steps.rows_per_step)
    full_rows = isinstance(spec, PretrainSpec) or (isinstance(spec, SupervisedSpec) and spec.packing)
    return steps.rows_per_step * length if full_rows else None


def _unknown(steps: Steps, data: DataSize | None) -> list[str]:
    if data is not None:
        return []
    what = "rows and tokens" if steps.total is not None else "rows, tokens and steps"
    return [f"{what} are not known before the data is read and tokenised"]


__all__ = ["DataSize", "JobPlan", "PlanContext", "Rows", "StagePlan", "job_config", "plan_dtype", "plan_job"]
