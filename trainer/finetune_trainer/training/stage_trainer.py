"""What every stage's trainer has in common, as a mixin over transformers' Trainer and TRL's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from finetune_trainer.checkpoint.space import full_disk_named

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset

    from finetune_trainer.esft.routing import RoutingCounter
    from finetune_trainer.training.batches import Feed
    from finetune_trainer.training.tools import StageTools

_Base: Any = transformers.Trainer if TYPE_CHECKING else object


class StageTrainer(_Base):
    """Mixin: prepared data as it is, counted tokens, no empty optimizer groups, and nothing but our checkpoints.

    Subclasses put it first: `class Sft(StageTrainer, trl.SFTTrainer)`.
    """

    feed: Feed
    """Which rows are trained on when."""
    weight_decays: list[float]
    """Of the optimizer's groups."""
    tokens_since_log: torch.Tensor | int = 0
    """Tokens this worker has trained on since they were last taken; a tensor, so that counting needs no sync."""
    samples_since_log: int = 0
    routing: RoutingCounter | None = None
    """Counts what the routers choose while training; None in a dense model."""
    tools: StageTools | None = None
    """Storage, the other workers and the driver, for a trainer that works beside its steps too."""
    keeps_last: bool = True
    """Whether the state after the last step gets a checkpoint."""
    paused: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Stops the training clock while it is entered."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """TRL's hook: the data is tokenised already."""
        return dataset

    def get_train_dataloader(self) -> DataLoader[Any]:
        """transformers' hook: rows as the feed divides them, in place of accelerate's division.

        The batches stay on the CPU until transformers moves each to the device, so that counting them needs no sync.
        """
        return self.feed.loader(
            self.train_dataset,
            self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """transformers' hook around each optimizer step's batches: count what is in them."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.count(batches)
        return batches, items

    def count(self, batches: list[dict[str, Any]]) -> None:
        """Count what is in batches that are trained on."""
        for batch in batches:
            self.tokens_since_log = self.tokens_since_log + count_tokens(batch)
            self.samples_since_log += len(batch["input_ids"])

    def final_metrics(self) -> dict[str, float]:
        """What a stage measures at its end beside the evaluation; every worker calls it."""
        return {}

    def take_counts(self) -> tuple[int, int]:
        """Tokens and rows of this worker since the last call."""
        counts = int(self.tokens_since_log), self.samples_since_log
        self.tokens_since_log, self.samples_since_log = 0, 0
        return counts

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' AdamW without empty groups.

        LoRA leaves the group of norms and biases empty; DeepSpeed drops it and then fails to match the groups of a
        checkpoint with those of the optimizer (OpenRLHF#1225).
        """
        optimizer = super().create_optimizer(model)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self.weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        return optimizer

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
        with self.paused():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """transformers' checkpoint, without the model card that TRL writes into each."""
        with self.paused(), full_disk_named(Path(self.args.output_dir)):
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
