"""Expert-specialized fine-tuning (arXiv 2407.01906): SFT of the experts that the router selects most for the data."""

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
"""File in a checkpoint: the trained weights, by name in the split model. Frozen weights come from the base model."""


@dataclass
class EsftExtensions(TrainerExtensions):
    """State that an `esft` stage adds to its trainer."""

    choice: ExpertChoice = field(init=False)
    """Choice of the experts, with their load before and after training."""
    experts: ExpertConfig = field(init=False)
    """The trained experts."""


class EsftTrainer(StageTrainer, trl.SFTTrainer):
    """TRL's SFTTrainer on a model whose stacked experts are split into trained and frozen weights."""

    stage: EsftExtensions

    @staticmethod
    def new_extensions() -> EsftExtensions:
        """Return the initial value of `stage`."""
        return EsftExtensions()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained weights only; with DeepSpeed nothing, because its own checkpoint contains them."""
        if self.is_deepspeed_enabled or not self.args.should_save:
            return
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: weight.detach().cpu().contiguous() for name, weight in self._trained().items()}, directory / TRAINED
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights that `save_model` wrote (a hook of transformers)."""
        saved, trained = load_file(Path(resume_from_checkpoint, TRAINED)), self._trained()
        if saved.keys() != trained.keys():
            raise RuntimeError(f"{resume_from_checkpoint} holds other experts than this stage trains")
        for name, weight in trained.items():
            weight.data.copy_(saved[name])

    def final_metrics(self) -> dict[str, float]:
        """Return metrics of the experts' load in the trained model. Every worker calls this."""
        return self.stage.choice.measure_after(self._whole(), self.stage.experts)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: weight for name, weight in self._whole().named_parameters() if weight.requires_grad}

    def _whole(self) -> Any:
        return self.accelerator.unwrap_model(self.model)


def make_trainer(context: StageContext) -> Any:
    """Return the trainer of an `esft` stage, after choosing the experts and splitting their weights."""
    spec = _spec(context)
    # Create the arguments before the model: with ZeRO-3 they enable sharded loading.
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
    """Measure, select and save the experts of a `scoreOnly` stage; return its metrics. Every worker calls this."""
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
    """Return the starting model on `device`. With ZeRO-3 it is placed while it loads."""
    model: Any = starting_model(context)
    return model if context.zero == 3 else model.to(device)
