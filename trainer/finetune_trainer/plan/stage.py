"""Plan one stage that trains or evaluates a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from transformers import PretrainedConfig

from finetune_api.runconfig import RunConfig
from finetune_api.stages import EvaluateSpec, PromptSpec, Stage, TrainedSpec
from finetune_api.training import Lora
from finetune_trainer.errors import UserError
from finetune_trainer.model.composite import frozen_note
from finetune_trainer.model.config import context_length
from finetune_trainer.model.expert_matmul import is_grouped
from finetune_trainer.plan.advice import advise
from finetune_trainer.plan.attention_masks import has_kernel, masked_layers
from finetune_trainer.plan.expert_copies import cast_elements, expert_warnings
from finetune_trainer.plan.experts import ExpertPlan, compare, expert_plan
from finetune_trainer.plan.generation_memory import answered_length, answering
from finetune_trainer.plan.host import host_estimate, host_work
from finetune_trainer.plan.inference import (
    check_reading,
    inference_memory,
    reading,
    reading_advice,
    reading_length,
)
from finetune_trainer.plan.memory import Workload, estimate, with_zero
from finetune_trainer.plan.model_size import (
    AdapterSize,
    ModelSize,
    adapter_size,
    meta_model,
    model_size,
    without_experts,
)
from finetune_trainer.plan.records import DataSize, PlanContext, Rows, StagePlan
from finetune_trainer.plan.saving import checkpoint_bytes
from finetune_trainer.plan.sharding_choice import HEADROOM, choose_zero, sharding_problems, sharding_warnings
from finetune_trainer.plan.states import trainable
from finetune_trainer.plan.steps import Steps, count_steps, flops_per_token
from finetune_trainer.stage_graph import place


@dataclass(frozen=True)
class StagePlanner:
    """Planner of one stage of a job."""

    run: RunConfig
    context: PlanContext
    config: PretrainedConfig
    dtype: torch.dtype
    index: int
    stage: Stage

    def plan(self, rows: Rows | None) -> StagePlan:
        spec, sharding = self.spec, self.run.job.spec.sharding
        found = sharding_problems(sharding, self.bits)
        model = meta_model(self.config, spec.task)
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
        notes = [*filter(None, [frozen_note(model)]), *notes]
        eager, summed = self._attention(model) == "eager", not any(is_grouped(module) for module in model.modules())
        load = self.load(length, adapter, eager=eager, summed=summed)
        kernel = has_kernel(load.kind, load.dtype_bytes, size.attention_dropout)
        load = replace(load, masked=masked_layers(model, spec, self._attention(model), load.batch, length, kernel))
        if isinstance(spec, PromptSpec):
            load, more = answering(size, load, spec, self.run, self.index, self.config)
            notes = [*notes, *more]
        experts = None
        if (esft := self.stage.esft) is not None:
            experts, whole = expert_plan(esft, model, self.path, self.run.base_dir), esft.train_non_experts
            load, notes = replace(load, tuned=experts.tuned, tuned_embeddings=whole), [*notes, *experts.notes]
        plan = self.assemble(size, load, known, [*notes, *sharding_warnings(sharding, self.bits)], experts)
        work = host_work(self.run, spec, self.config, model, load.workers, load.dtype_bytes)
        return replace(plan, host=host_estimate(size, with_zero(load, plan.zero), plan.memory, work))

    def evaluation(self, spec: EvaluateSpec, rows: Rows | None) -> StagePlan:
        """Return the plan of an `evaluate` stage, in which each worker loads one whole model after the other."""
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
            casts_experts=device.kind == "cuda" and load.tuned is None and cast_elements(size, with_zero(load, 0)) > 0,
        )
        load = with_zero(load, zero)
        memory = estimate(size, load)
        spare = round(HEADROOM * device.memory_bytes) - memory.total
        steps = count_steps(spec, data.rows if data else None, load.workers)
        limit = round(HEADROOM * device.memory_bytes)
        fix = partial(advise, size, load, spec, self.path, limit, self._spare_adapter, self._lean_adapter)
        adapter_parameters = load.adapter.parameters if load.adapter else None
        if experts is None:
            adapted = load.adapter.active(size) if load.adapter else None
            flops = flops_per_token(size, load.length, adapted, spec.extra_forwards)
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
            warnings=tuple(expert_warnings(size, load, self.path)),
            checkpoint=checkpoint_bytes(size, load),
            comparison=() if experts is None or not experts.tuned else compare(size, load, self._spare_adapter()),
        )

    def load(self, length: int, adapter: AdapterSize | None, eager: bool, summed: bool) -> Workload:
        spec, sharding = self.spec, self.run.job.spec.sharding
        quantization = getattr(spec, "quantization", None)
        return Workload(
            batch=spec.per_device_train_batch_size * spec.sequences_per_row,
            length=length,
            dtype_bytes=self.dtype.itemsize,
            workers=self.context.workers,
            adapter=adapter,
            quantized_bits=self.bits,
            double_quant=quantization is None or quantization.double_quant,
            accumulation=spec.gradient_accumulation_steps,
            checkpointing=spec.gradient_checkpointing,
            eager=eager,
            summed_stacks=summed,
            full_logits=spec.task == "masked",
            no_logits=spec.task == "reward",
            reference=spec.holds_reference,
            offload_optimizer=sharding.offload_optimizer,
            offload_param=sharding.offload_param,
            kind=self.context.device.kind,
        )

    def length(self, data: DataSize | None) -> tuple[int, list[str]]:
        """Return the tokens per row, and a note if they are only the model's context length."""
        spec = self.spec
        if spec.fills_rows:
            assert spec.row_limit is not None
            return spec.row_limit, []
        if spec.answer_length:
            return self._answered_length(spec, data)
        longest = data.longest if data else None
        limits = [limit for limit in (spec.row_limit, longest, context_length(self.config)) if limit]
        length = min(limits, default=1024)
        if spec.row_limit or longest:
            return length, []
        return length, [f"the longest example is not known: memory is for the model's context, {length} tokens"]

    def _answered_length(self, spec: TrainedSpec, data: DataSize | None) -> tuple[int, list[str]]:
        """Return the tokens of the longest prompt with the longest completion, and a note if they are unknown."""
        context = context_length(self.config)
        length = answered_length(spec, data.longest if data else None, context)
        if length is not None:
            return length, []
        length = context or 1024
        return length, [f"the longest prompt is not known: memory is for the model's context, {length} tokens"]

    def adapter(self) -> AdapterSize:
        lora = _lora(self.spec)
        assert lora is not None
        return adapter_size(meta_model(self.config, self.spec.task), lora, f"{self.path}.lora")

    def _spare_adapter(self) -> AdapterSize:
        """Return the size of a default adapter, for advice."""
        return adapter_size(meta_model(self.config, self.spec.task), Lora())

    def _lean_adapter(self) -> tuple[AdapterSize, list[str]]:
        """Return the stage's adapter without stacked experts, for advice."""
        lora = _lora(self.spec)
        assert lora is not None
        return without_experts(meta_model(self.config, self.spec.task), lora)

    def _attention(self, model: Any) -> str:
        """Return the attention implementation that the job sets, else transformers' default."""
        requested = self.run.job.spec.model.attn_implementation
        return requested if requested != "auto" else str(model.config._attn_implementation)

    @property
    def spec(self) -> TrainedSpec:
        spec = self.stage.spec
        return cast(TrainedSpec, spec)  # `plan_job` calls `plan` for trained stages only

    @property
    def path(self) -> str:
        return place(self.run, self.index)

    @property
    def bits(self) -> int | None:
        quantization = getattr(self.spec, "quantization", None)
        return None if quantization is None else quantization.bits


def _lora(spec: TrainedSpec) -> Lora | None:
    return getattr(spec, "lora", None)


def _tokens_per_step(spec: TrainedSpec, steps: Steps, length: int, data: DataSize | None) -> int | None:
    if spec.answer_length:
        return steps.rows_per_step * spec.sequences_per_row * length
    if data is not None and data.rows:
        return round(data.tokens / data.rows * steps.rows_per_step)
    return steps.rows_per_step * length if spec.fills_rows else None


def _unknown(steps: Steps, data: DataSize | None) -> list[str]:
    if data is not None:
        return []
    what = "rows and tokens" if steps.total is not None else "rows, tokens and steps"
    return [f"{what} are not known before the data is read and tokenised"]
