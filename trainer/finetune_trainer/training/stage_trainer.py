"""What every stage's trainer has in common, as a mixin over transformers' Trainer and TRL's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.trainer_utils import EvalLoopOutput

from finetune_trainer.heartbeat import beat, during, enter
from finetune_trainer.model.expert_matmul import factor_adapters
from finetune_trainer.model.router_logits import no_router_logits, prepare_balance_loss
from finetune_trainer.storage.disk_full import full_disk_named
from finetune_trainer.training.held_out import HeldOutLoader, Means, Sums, share, token_sums
from finetune_trainer.training.trainer_extensions import StageParts

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset

LOADING, FORWARD, BACKWARD, UPDATE = range(4)
"""Places of the phases within a step, by which a worker that is behind is found."""
_Base: Any = transformers.Trainer if TYPE_CHECKING else object


class StageTrainer(_Base):
    """Mixin: prepared data as it is, counted tokens, no empty optimizer groups, means over all held-out tokens or
    pairs, and nothing but our checkpoints.

    Subclasses put it first: `class Sft(StageTrainer, trl.SFTTrainer)`. They keep attributes of their own in `stage`,
    and say in `measure` what an evaluation measures.
    """

    stage: StageParts
    makes_pairs = False
    """Whether a step's rows are pairs that the stage makes, and not rows of its data."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stage = self.new_parts()
        super().__init__(*args, **kwargs)
        self._share_gradients()
        prepare_balance_loss(self.model)
        factor_adapters(self.model)

    def _share_gradients(self) -> None:
        """Make gradients views of DDP's buckets, which are 4 bytes per trained weight otherwise (torch's DDP, ZeRO-0).

        accelerate wraps a model in DDP wherever there is a process group, for one worker too.
        """
        handler = self.accelerator.ddp_handler
        if handler is not None:
            handler.gradient_as_bucket_view = True

    @staticmethod
    def new_parts() -> StageParts:
        """What `stage` holds."""
        return StageParts()

    def measure(self, model: Any, inputs: dict[str, Any]) -> Sums:
        """The sums that a batch of held-out rows adds to an evaluation."""
        return token_sums(model, inputs)

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """TRL's hook: the data is tokenised already."""
        return dataset

    def get_train_dataloader(self) -> DataLoader[Any]:
        """transformers' hook: rows as the feed divides them, in place of accelerate's division.

        The batches stay on the CPU until transformers moves each to the device, so that counting them needs no sync.
        """
        return self.stage.feed.loader(
            self.train_dataset,
            self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """transformers' hook around each optimizer step's batches: count what is in them."""
        enter("loading rows", step=self.state.global_step, order=LOADING)
        if self.stage.times is not None:
            self.stage.times.begin()
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.count(batches)
        return batches, items

    def count(self, batches: list[dict[str, Any]]) -> None:
        """Count what is in batches that are trained on."""
        for batch in batches:
            self.stage.tokens = self.stage.tokens + count_tokens(batch)
            self.stage.samples += len(batch["input_ids"])

    def final_metrics(self) -> dict[str, float]:
        """What a stage measures at its end beside the evaluation; every worker calls it."""
        return {}

    def take_counts(self) -> tuple[int, int]:
        """Tokens and rows of this worker since the last call."""
        counts = int(self.stage.tokens), self.stage.samples
        self.stage.tokens, self.stage.samples = 0, 0
        return counts

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' AdamW without empty groups.

        LoRA leaves the group of norms and biases empty; DeepSpeed drops it and then fails to match the groups of a
        checkpoint with those of the optimizer (OpenRLHF#1225).
        """
        optimizer = super().create_optimizer(model)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self.stage.weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        return optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """transformers' forward and backward pass. What it does in the first step, such as compiling, may take long."""
        step = self.state.global_step
        warm = step > self._initial_global_step
        enter("forward pass", measured=warm, step=step, order=FORWARD)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        enter("update, metrics and callbacks", step=step, order=UPDATE)
        return loss

    def rows_of(self, step: int, rank: int | None = None, number: int = 0) -> list[int]:
        """Return the numbers of the rows that the step after `step` steps trains on, in the prepared training data; of
        one worker and forward pass, both counted from 0, where a worker is named."""
        return self.stage.feed.rows_of(step, len(self.train_dataset) if self.stage.feed.stream is None else None, rank,
                                       number)  # fmt: skip

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """transformers' hook between gradients and update: a step with bad numbers may have none."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.stage.guard is not None:
            self.stage.guard.after_gradients(norm, model)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """transformers' line of metrics, whose loss is the mean of the steps that were trained on."""
        if self.stage.guard is not None and "loss" in logs:
            self.stage.guard.correct(logs)
        super().log(logs, start_time)

    def _run_epoch(self, **kwargs: Any) -> None:
        """Nothing, where a resumed run has all its steps behind it; transformers would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self.args.ignore_data_skip:
            # Without skipping, transformers counts a resumed stream's epochs from 0; the share of all steps is right.
            done = self.state.global_step / self.state.max_steps
            kwargs |= {"epoch": done, "epochs_trained": done}
        super()._run_epoch(**kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """transformers' evaluation, whose time does not count as training."""
        with self.stage.paused(), during("evaluating"):
            return super().evaluate(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """transformers' hook: each row on one worker, in place of accelerate's division, which repeats some."""
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
        """transformers' loop over held-out rows; the means are ours, see `training.held_out`."""
        self.stage.held_out = Means(getattr(dataloader, "counts", None))
        with no_router_logits(self.model):
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self.finish_means(self.stage.held_out.over_all(self.accelerator))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def finish_means(self, means: dict[str, float]) -> dict[str, float]:
        """The metrics of an evaluation, given the means of what `measure` sums up."""
        return means

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[None, None, None]:
        """transformers' hook for each batch of held-out rows; nothing is left for transformers to average."""
        beat()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self.measure(model, inputs)
        self.stage.held_out.add(sums, self.accelerator.device)
        return None, None, None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """transformers' checkpoint, without the model card that TRL writes into each."""
        if self.stage.guard is not None:
            self.stage.guard.check_weights()
        with self.stage.paused(), during("writing a checkpoint"), full_disk_named(Path(self.args.output_dir)):
            transformers.Trainer._save_checkpoint(self, model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights for a resumed run; not in a DeepSpeed checkpoint, whose shards hold them already.

        They have the names that they have in the model: transformers would save them under the names of the model's
        own checkpoint, and find nothing by those names when it resumes (composite models, stacked experts).
        """
        if _internal_call and self.is_deepspeed_enabled:
            return
        with own_names(self.accelerator.unwrap_model(self.model)):
            super().save_model(output_dir, _internal_call)


@contextmanager
def own_names(model: Any) -> Iterator[None]:
    """Inside, `save_pretrained` keeps the names that the weights have in the model."""
    conversions = getattr(model, "_weight_conversions", None)
    model._weight_conversions = []
    try:
        yield
    finally:
        model._weight_conversions = conversions


def count_tokens(batch: dict[str, Any]) -> torch.Tensor | int:
    """Tokens in a batch, padding left out where the batch tells."""
    mask = batch.get("attention_mask")
    return mask.sum() if mask is not None else batch["input_ids"].numel()
