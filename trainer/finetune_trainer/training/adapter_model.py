"""Loads the model of a stage that may train adapters: new ones, or the adapter of the previous stage."""

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
from finetune_trainer.training.merging import merged_source


def adapted_model(context: StageContext) -> tuple[PreTrainedModel | PeftModel, LoraConfig | None]:
    """Return the model, and the configuration of the adapter that TRL must add to it, or None if it adds none."""
    spec = _spec(context)
    if spec.lora is None:
        return starting_model(context), None
    model = _base(context)
    if context.carries_adapter:
        assert context.source.name is not None
        # ZeRO-3 needs all weights in one dtype (trl#6089); TRL creates new adapters in the dtype of the base, too.
        one_dtype = context.zero == 3 and spec.quantization is None
        return attach_adapter(model, context.source.name, trainable=True, float32=not one_dtype), None
    return model, _new_adapter(context, spec, model)


def fresh_adapter(context: StageContext) -> tuple[PreTrainedModel, LoraConfig | None]:
    """Return the same as `adapted_model`, but merge the adapter of the previous stage before a new one is added."""
    spec = _spec(context)
    model = _base(context, merged_source(context))
    return model, None if spec.lora is None else _new_adapter(context, spec, model)


def starting_model(context: StageContext) -> PreTrainedModel:
    """Return the model with which the stage starts, with the adapter of the previous stage merged into it."""
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
    """Return a TRL trainer on the stage's model, data and tokenizer, with its adapters in float32.

    Args:
        kind: class of the trainer.
        context: the stage.
        model: the model, by `adapted_model` or `fresh_adapter`.
        peft_config: the adapter that TRL must add, or None.
        args: TRL's configuration of the trainer.
        more: further arguments of the trainer.
    """
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
    """Cast trained weights to float32.

    TRL casts adapters on a quantized base to bfloat16; DeepSpeed keeps float32 copies itself.

    The outputs of `modules_to_save` keep the compute dtype of the base. So activations need no more memory, and the
    model starts equal to the reference model, which runs without the trained modules.
    """
    spec = _spec(context)
    # transformers does not shard a quantized base when it loads it, so here the adapters are complete under ZeRO-3 too.
    if context.zero and spec.quantization is None:
        return
    train_in_float32(model)
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for module in wrapper.modules_to_save.values():
                module.register_forward_hook(partial(_cast_output, context.precision.compute))


def _cast_output(dtype: torch.dtype, module: Any, args: Any, output: Any) -> Any:
    """Cast the output of a module. A forward hook."""
    if isinstance(output, tuple):
        return tuple(_cast_output(dtype, module, args, one) for one in output)
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
