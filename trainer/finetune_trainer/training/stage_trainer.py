"""The mixin of all stages' trainers, over transformers' Trainer and TRL's trainers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.trainer_utils import EvalLoopOutput

from finetune_trainer.heartbeat import enter_phase, in_phase, record_progress
from finetune_trainer.model.expert_matmul import factor_adapters
from finetune_trainer.model.router_logits import no_router_logits, prepare_balance_loss
from finetune_trainer.storage.disk_full import name_full_disk
from finetune_trainer.training.held_out import HeldOutLoader, Means, Sums, share, token_sums
from finetune_trainer.training.trainer_extensions import TrainerExtensions

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset

LOADING, FORWARD, BACKWARD, UPDATE = range(4)
"""Positions of the phases within a step, by which a stalled worker is found."""
_Base: Any = transformers.Trainer if TYPE_CHECKING else object


class StageTrainer(_Base):  # type: ignore[misc]  # a mixin: its base is the trainer of the subclass
    """A mixin that trains on prepared data, counts tokens, and computes exact evaluation means.

    It also omits empty optimizer groups and writes only the checkpoints that the store needs. Subclasses name it first:
    `class Sft(StageTrainer, trl.SFTTrainer)`. They keep further attributes in `stage`, and `measure` returns what an
    evaluation measures.
    """

    stage: TrainerExtensions
    makes_pairs = False
    """Whether the rows of a step are pairs that the stage generates, and not rows of its data."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stage = self.new_extensions()
        super().__init__(*args, **kwargs)
        self._share_gradients()
        prepare_balance_loss(self.model)
        factor_adapters(self.model)

    def _share_gradients(self) -> None:
        """Make gradients views of DDP's buckets, which saves 4 bytes per trained weight (torch's DDP, ZeRO-0).

        accelerate wraps a model in DDP if there is a process group, even with one worker.
        """
        handler = self.accelerator.ddp_handler
        if handler is not None:
            handler.gradient_as_bucket_view = True

    @staticmethod
    def new_extensions() -> TrainerExtensions:
        """Return the initial value of `stage`."""
        return TrainerExtensions()

    def measure(self, model: Any, inputs: dict[str, Any]) -> Sums:
        """Return the sums that a batch of held-out rows adds to an evaluation."""
        return token_sums(model, inputs)

    def _prepare_dataset(self, dataset: Dataset[Any], *_: Any, **__: Any) -> Dataset[Any]:
        """Return the dataset unchanged, because it is tokenised already. Overrides TRL's method."""
        return dataset

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a data loader of the rows as the feed divides them, instead of accelerate's division.

        Batches stay on the CPU until transformers moves them to the device, so that counting needs no synchronisation.
        """
        return self.stage.feed.loader(
            self.train_dataset,
            self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batches of an optimizer step, and count their tokens and rows."""
        enter_phase("loading rows", step=self.state.global_step, order=LOADING)
        if self.stage.times is not None:
            self.stage.times.begin()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.count(batches)
        return batches, items

    def count(self, batches: list[dict[str, Any]]) -> None:
        """Count the tokens and rows of a step's batches."""
        for batch in batches:
            self.stage.tokens = self.stage.tokens + count_tokens(batch)
            self.stage.samples += len(batch["input_ids"])

    def final_metrics(self) -> dict[str, float]:
        """Return metrics of the stage's end in addition to the evaluation. Every worker calls it."""
        return {}

    def take_counts(self) -> tuple[int, int]:
        """Return the tokens and rows of this worker since the last call."""
        counts = int(self.stage.tokens), self.stage.samples
        self.stage.tokens, self.stage.samples = 0, 0
        return counts

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create transformers' AdamW without empty groups.

        With LoRA the group of norms and biases is empty; DeepSpeed drops it and then fails to match the groups of a
        checkpoint with those of the optimizer (OpenRLHF#1225).
        """
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self.stage.weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        return optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the forward and backward pass. The first step may take long, because it may compile."""
        step = self.state.global_step
        warm = step > self._initial_global_step
        enter_phase("forward pass", measured=warm, step=step, order=FORWARD)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        enter_phase("update, metrics and callbacks", step=step, order=UPDATE)
        return loss

    def rows_of(self, step: int, rank: int | None = None, number: int = 0) -> list[int]:
        """Return the numbers of one step's rows in the prepared training data; see `Feed.rows_of`."""
        length = len(self.train_dataset) if self.stage.feed.stream is None else None
        return self.stage.feed.rows_of(step, length, rank, number)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the gradient norm. transformers calls it before the update, which a bad step skips."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.stage.guard is not None:
            self.stage.guard.after_gradients(norm, model)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a line of metrics, whose loss is the mean over the steps that were not skipped."""
        if self.stage.guard is not None and "loss" in logs:
            self.stage.guard.correct(logs)
        super().log(logs, start_time)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless a resumed run has done all its steps: transformers would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self.args.ignore_data_skip:
            # Without skipping, transformers counts a resumed stream's epochs from 0. The share of steps is correct.
            done = self.state.global_step / self.state.max_steps
            kwargs |= {"epoch": done, "epochs_trained": done}
        super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate. The time does not count as training."""
        with self.stage.paused(), in_phase("evaluating"):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            return metrics

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return a data loader with each row on exactly one worker; accelerate's division would repeat some rows."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        workers, rank = self.accelerator.num_processes, self.accelerator.process_index
        batches, counts = share(len(rows), self.args.per_device_eval_batch_size, workers, rank)
        return HeldOutLoader(
            rows,
            batches,
            counts,
            self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Run the evaluation with the means of `training.held_out`."""
        self.stage.held_out = Means(getattr(dataloader, "counts", None))
        with no_router_logits(self.model):
            output: EvalLoopOutput = super().evaluation_loop(
                dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        means = self.finish_means(self.stage.held_out.reduce(self.accelerator))
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def finish_means(self, means: dict[str, float]) -> dict[str, float]:
        """Return the metrics of an evaluation, given the means of the sums of `measure`."""
        return means

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[None, None, None]:
        """Add the sums of a batch of held-out rows, and return no loss for transformers to average."""
        record_progress()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self.measure(model, inputs)
        self.stage.held_out.add(sums, self.accelerator.device)
        return None, None, None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint without the model card that TRL adds to each."""
        if self.stage.guard is not None:
            self.stage.guard.check_weights()
        with self.stage.paused(), in_phase("writing a checkpoint"), name_full_disk(Path(self.args.output_dir)):
            transformers.Trainer._save_checkpoint(self, model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights for a resumed run, except in a DeepSpeed checkpoint, whose shards contain them.

        They are saved by their names in the model: transformers would save them by the names of the original checkpoint
        and would not find them when it resumes (composite models, stacked experts).
        """
        if _internal_call and self.is_deepspeed_enabled:
            return
        with own_names(self.accelerator.unwrap_model(self.model)):
            super().save_model(output_dir, _internal_call)


@contextmanager
def own_names(model: Any) -> Iterator[None]:
    """Make `save_pretrained` keep the names of the weights in the model. A context manager."""
    conversions = getattr(model, "_weight_conversions", None)
    model._weight_conversions = []
    try:
        yield
    finally:
        model._weight_conversions = conversions


def count_tokens(batch: dict[str, Any]) -> torch.Tensor | int:
    """Return the number of tokens in a batch, without padding if the batch has an attention mask."""
    mask: torch.Tensor | None = batch.get("attention_mask")
    return mask.sum() if mask is not None else int(batch["input_ids"].numel())
