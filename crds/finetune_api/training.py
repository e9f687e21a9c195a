"""The fields every trained stage shares, under the names of transformers, PEFT and TRL in camelCase."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel, Json, cel, rules
from finetune_api.data import DataSpec
from finetune_api.declaration import TrainingDeclaration, Updates

PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
Rate = Annotated[float, Field(ge=0, le=1)]
ModuleName = Annotated[str, Field(min_length=1, max_length=256)]
Modules = Annotated[list[ModuleName], Field(min_length=1, max_length=256)]

ALL_LINEAR = "all-linear"

STREAMING_RULE: Json = cel(
    "!self.data.streaming || has(self.maxSteps)", "streaming data has no known length: set maxSteps"
)
QUANTIZED_LORA_RULE: Json = cel(
    "!has(self.quantization) || has(self.lora)", "quantization needs lora: quantized weights don't train"
)


class Lora(ApiModel):
    """Low-rank adapters (PEFT's LoraConfig) in place of full training."""

    r: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of the update matrices."""
    lora_alpha: Annotated[int, Field(ge=1, le=65536)] = 32
    """Scale of the update: alpha/r, or alpha/sqrt(r) with `useRslora`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input."""
    target_modules: Modules = Field(default=[ALL_LINEAR])
    """Names (or endings of names) of the modules that get an adapter. `all-linear`: every linear layer but the
    output head and an expert model's router."""
    modules_to_save: Modules | None = None
    """Modules trained in full beside the adapters, such as `embed_tokens`. Default: none."""
    use_rslora: bool = False
    """Rank-stabilised scaling, alpha/sqrt(r) (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adapters (arXiv 2402.09353)."""
    merge: bool = True
    """At the stage's end merge the adapter into the base model in the base's original precision (true), or keep it
    as an adapter, which the next stage trains on (false)."""


class Quantization(ApiModel):
    """Base weights quantized by bitsandbytes while adapters train (QLoRA)."""

    bits: Literal[4, 8] = 4
    """Bits per weight."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Number format of 4-bit weights."""
    double_quant: bool = True
    """Quantize the 4-bit constants too."""


class TrainingSpec(TrainingDeclaration):
    """Data, optimizer, schedule and saving: what every trained stage has."""

    model_config = rules(STREAMING_RULE)

    data: DataSpec
    """Training data."""
    eval_data: DataSpec | None = None
    """Held-out data. Default: the `validationSplit` of `data`, if any."""
    num_train_epochs: Annotated[float, Field(gt=0, le=100000, json_schema_extra={"minimum": 0})] = 1.0
    """Passes over the data, where `maxSteps` is not set."""
    max_steps: PositiveInt | None = None
    """Optimizer steps. Default: as many as `numTrainEpochs` makes."""
    per_device_train_batch_size: PositiveInt = 8
    """Rows per worker and forward pass."""
    per_device_eval_batch_size: PositiveInt = 8
    """Rows per worker and forward pass in evaluation."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per optimizer step."""
    learning_rate: Annotated[float, Field(ge=0, le=10)] = 2e-5
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: Rate = 0.03
    """Share of the steps in which the learning rate rises from 0, where `warmupSteps` is not set."""
    warmup_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Steps in which the learning rate rises from 0. Default: by `warmupRatio`."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Decoupled weight decay; norms and biases have none."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay rate of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's decay rate of the second moment."""
    adam_epsilon: Annotated[float, Field(ge=0, le=1)] = 1e-8
    """AdamW's term for numerical stability."""
    max_grad_norm: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Gradients are clipped to this norm; 0 leaves them as they are."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of initialisation, data order and dropout."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a quarter more time."""
    dataloader_num_workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Processes per worker that load batches ahead; 0 loads in the worker itself."""
    logging_steps: PositiveInt = 1
    """Steps between two lines of metrics."""
    eval_steps: PositiveInt | None = None
    """Steps between two evaluations. Default: one before the first step and one at the end."""
    save_steps: PositiveInt = 500
    """Steps between two checkpoints; one more is saved at the stage's end."""
    save_total_limit: PositiveInt = 2
    """Complete checkpoints kept per stage; older ones are deleted."""

    def faults(self) -> Iterator[str]:
        if self.data.streaming and self.max_steps is None:
            yield "streaming data has no known length: set maxSteps"


class AdapterSpec(TrainingSpec):
    """Training of every weight, or of low-rank adapters."""

    model_config = rules(STREAMING_RULE, QUANTIZED_LORA_RULE)

    lora: Lora | None = None
    """Train adapters. Default: train every weight."""
    quantization: Quantization | None = None
    """Quantize the base model under the adapters. Default: not quantized."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.quantization is not None and self.lora is None:
            yield "quantization needs lora: quantized weights don't train"

    @property
    def updates(self) -> Updates:
        return "weights" if self.lora is None else "adapter"

    @property
    def merges(self) -> bool:
        return self.lora is not None and self.lora.merge


def resolve_overflow(overflow: str, limit: int | None) -> str:
    """Return what happens to a row longer than `limit` tokens: `auto` truncates where a limit is set, else refuses."""
    if overflow != "auto":
        return overflow
    return "error" if limit is None else "truncate"
