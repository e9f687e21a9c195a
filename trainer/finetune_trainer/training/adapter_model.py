"""The model of a stage that may train adapters: new ones, or those that the stage before carried on."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedModel

from finetune_api.training import AdapterSpec
from finetune_trainer.model.adapter import attach_adapter
from finetune_trainer.model.load import load_model
from finetune_trainer.model.lora import lora_config
from finetune_trainer.model.precision import train_in_float32
from finetune_trainer.model.source import ModelSource
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.merging import whole_source


def adapted_model(context: StageContext) -> tuple[PreTrainedModel | PeftModel, LoraConfig | None]:
    """The model, and the configuration of the adapter that TRL is to add to it; None where it adds none."""
    spec = _spec(context)
    if spec.lora is None:
        return starting_model(context), None
    model = _base(context)
    if context.carries_adapter:
        assert context.source.name is not None
        # ZeRO-3 takes weights of one format only (trl#6089); TRL gives new adapters the base's there, too.
        one_format = context.zero == 3 and spec.quantization is None
        return attach_adapter(model, context.source.name, trainable=True, float32=not one_format), None
    return model, _new_adapter(context, spec, model)


def fresh_adapter(context: StageContext) -> tuple[PreTrainedModel, LoraConfig | None]:
    """As `adapted_model`, but an adapter that the stage before carried on is merged before a new one is added."""
    spec = _spec(context)
    model = _base(context, whole_source(context))
    return model, None if spec.lora is None else _new_adapter(context, spec, model)


def starting_model(context: StageContext) -> PreTrainedModel:
    """The model as the stage finds it, an adapter that the stage before carried on merged in."""
    model = _base(context)
    if not context.carries_adapter:
        return model
    assert context.source.name is not None
    adapted: Any = attach_adapter(model, context.source.name)
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def adapted_trainer(
    kind: Any, context: StageContext, model: Any, peft_config: LoraConfig | None, args: Any, **more: Any
) -> Any:
    """A TRL trainer of that kind on the stage's model, data and tokenizer, its adapters finished."""
    trainer = kind(
        model=model,
        args=args,
        train_dataset=context.sample,
        eval_dataset=context.data.eval,
        processing_class=context.tokenizer,
        peft_config=peft_config,
        **more,
    )
    _finish_adapters(trainer.model, context)
    return trainer


def _finish_adapters(model: Any, context: StageContext) -> None:
    """Keep what is trained in float32. TRL casts adapters on a quantized base to bfloat16; DeepSpeed keeps float32
    copies itself.

    `modules_to_save` give their output in the base's format all the same. So activations take no more memory, and the
    model in training starts as equal to the reference, which runs without its trained modules.
    """
    spec = _spec(context)
    # transformers divides no quantized base as it loads, so the adapters are whole here under ZeRO-3 too.
    if context.zero and spec.quantization is None:
        return
    train_in_float32(model)
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for module in wrapper.modules_to_save.values():
                module.register_forward_hook(partial(_in_format, context.precision.compute))


def _in_format(dtype: torch.dtype, module: Any, args: Any, output: Any) -> Any:
    """A forward hook: a module's output in that format."""
    if isinstance(output, tuple):
        return tuple(_in_format(dtype, module, args, one) for one in output)
    return output.to(dtype) if isinstance(output, torch.Tensor) and output.is_floating_point() else output


def _spec(context: StageContext) -> AdapterSpec:
    spec = context.spec
    assert isinstance(spec, AdapterSpec), f"{context.where} has no adapters"
    return spec


def _new_adapter(context: StageContext, spec: AdapterSpec, model: PreTrainedModel) -> LoraConfig:
    assert spec.lora is not None
    torch.manual_seed(spec.seed)
    return lora_config(spec.lora, model, f"{context.where}.lora")


def _base(context: StageContext, source: ModelSource | None = None) -> PreTrainedModel:
    spec = context.spec
    return load_model(
        source or context.source,
        context.job_model,
        context.precision,
        task=spec.task,
        quantization=getattr(spec, "quantization", None),
        seed=spec.seed,
        device=context.load_device,
    )
