"""Expert-specialized fine-tuning (arXiv 2407.01906): supervised fine-tuning of the experts that the data uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from safetensors.torch import load_file, save_file

from finetune_api.problems import Problem
from finetune_api.stages import EsftSpec
from finetune_trainer.errors import UserError
from finetune_trainer.esft.selection import ExpertConfig
from finetune_trainer.esft.trainable import prepare, require_input_gradients
from finetune_trainer.model.precision import train_in_float32
from finetune_trainer.stages.esft.expert_choice import ExpertChoice
from finetune_trainer.training.adapter_model import starting_model
from finetune_trainer.training.arguments import training_arguments
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.expert_results import save_scores
from finetune_trainer.training.stage_io import StageIO
from finetune_trainer.training.stage_trainer import StageTrainer
from finetune_trainer.training.supervised_batches import supervised_batches
from finetune_trainer.training.trainer_extensions import TrainerExtensions

TRAINED = "trained.safetensors"
"""In a checkpoint: the trained weights under their names in the split model. The frozen ones are the base's."""


@dataclass
class EsftExtensions(TrainerExtensions):
    """What an `esft` stage adds to its trainer."""

    choice: ExpertChoice = field(init=False)
    """How the experts are used, before and after."""
    experts: ExpertConfig = field(init=False)
    """The experts that are trained."""


class EsftTrainer(StageTrainer, trl.SFTTrainer):
    """TRL's SFTTrainer on a model in split storage."""

    stage: EsftExtensions

    @staticmethod
    def new_extensions() -> EsftExtensions:
        """What `stage` holds."""
        return EsftExtensions()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trained weights alone; DeepSpeed's shards hold them already."""
        if self.is_deepspeed_enabled or not self.args.should_save:
            return
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: weight.detach().cpu().contiguous() for name, weight in self._trained().items()}, directory / TRAINED
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Transformers' hook: the inverse of `save_model`."""
        saved, trained = load_file(Path(resume_from_checkpoint, TRAINED)), self._trained()
        if saved.keys() != trained.keys():
            raise RuntimeError(f"{resume_from_checkpoint} holds other experts than this stage trains")
        for name, weight in trained.items():
            weight.data.copy_(saved[name])

    def final_metrics(self) -> dict[str, float]:
        """The experts' use by the trained model; every worker calls it."""
        return self.stage.choice.measure_after(self._whole(), self.stage.experts)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: weight for name, weight in self._whole().named_parameters() if weight.requires_grad}

    def _whole(self) -> Any:
        return self.accelerator.unwrap_model(self.model)


def make_trainer(context: StageContext) -> Any:
    """The trainer of an `esft` stage, its experts chosen and split."""
    spec = _spec(context)
    # The arguments come first: with ZeRO-3 they divide the model among the workers while it loads.
    args = trl.SFTConfig(**training_arguments(context), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    model = _model(context, args.device)
    choice = ExpertChoice(context, spec, model)
    config = choice.choose(model)
    layers = prepare(model, config)
    if context.zero == 0:
        train_in_float32(model)
    require_input_gradients(model, layers)
    trainer = EsftTrainer(
        model=model,
        args=args,
        train_dataset=context.sample,
        eval_dataset=context.data.eval,
        processing_class=context.tokenizer,
        **supervised_batches(context, spec),
    )
    trainer.stage.choice, trainer.stage.experts = choice, config
    return trainer


def perform(context: StageContext, tools: StageIO) -> dict[str, float]:
    """A `scoreOnly` stage: measure, select and write down; returns its metrics. Every worker calls it."""
    spec = _spec(context)
    args = trl.SFTConfig(**training_arguments(context), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    model = _model(context, args.device)
    choice = ExpertChoice(context, spec, model)
    config = choice.choose(model)
    if tools.first:
        tools.result(lambda directory: save_scores(context, directory))
    chosen = sum(map(len, config.experts.values()))
    metrics = {"experts_selected": float(chosen), "experts": float(sum(choice.sizes.values()))}
    return metrics | {"expert_entropy": choice.before["balance"]["mean"], "tokens": float(choice.before["tokens"])}


def _spec(context: StageContext) -> EsftSpec:
    spec = context.spec
    assert isinstance(spec, EsftSpec)
    if context.carries_adapter:
        message = "starts from an adapter that is not merged: set lora.merge in the stage before"
        raise UserError([Problem(context.where, message)])
    return spec


def _model(context: StageContext, device: torch.device) -> Any:
    """The model on its device, where it is going anyway; ZeRO-3 has placed it as it loaded."""
    model: Any = starting_model(context)
    return model if context.zero == 3 else model.to(device)
