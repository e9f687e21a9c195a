"""Base of the RLOO and GRPO trainers: assignment of prompts to steps, seeded generation, rewards and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from finetune_api.stages import RlhfSpec
from finetune_trainer.rewards.combined import NamedReward, columns_of, weighted
from finetune_trainer.stages.rlhf.kl_bound import KlBound
from finetune_trainer.training.answers import SEEDS, PromptRow, generate_completions, prompt_row, sampling_options
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.prompt_feed import PromptFeed
from finetune_trainer.training.stage_trainer import StageTrainer
from finetune_trainer.training.trainer_extensions import TrainerExtensions

Batch = dict[str, torch.Tensor]
ANSWERS = "answers-{}.safetensors"
"""File in a checkpoint, by rank: a worker's completions, if further optimizer steps use them (`num_iterations`)."""
HELD_OUT = SEEDS - 1
"""Offset of the seed for completions of held-out prompts; training steps use the offsets below."""


@dataclass
class PolicyExtensions(TrainerExtensions):
    """State that an `rlhf` stage adds to its trainer."""

    feed: PromptFeed = field(init=False)
    context: StageContext = field(init=False)
    spec: RlhfSpec = field(init=False)
    rewards: list[NamedReward] = field(init=False)
    bound: KlBound | None = None
    answered: list[Batch] | None = None
    """Batches of the current completions, one for each forward pass."""
    asked: tuple[list[PromptRow], list[int]] = field(init=False)
    """This worker's prompts of the current step, and a unique number of each, which seeds its completions."""


class PolicyTrainer(StageTrainer):
    """Mixin over TRL's RLOOTrainer and GRPOTrainer.

    Completions of all prompts of an optimizer step are generated at its beginning. A completion depends on the stage's
    seed, the step and the prompt's position in it, so it is the same after a resume and for any world size. TRL
    computes the advantages and the loss.
    """

    stage: PolicyExtensions

    @staticmethod
    def new_extensions() -> PolicyExtensions:
        """Return the initial value of `stage`."""
        return PolicyExtensions()

    def begin(self, context: StageContext, spec: RlhfSpec, rewards: list[NamedReward], stops: list[int]) -> None:
        """Set the state that TRL's constructor has no arguments for."""
        self.stage.context, self.stage.spec, self.stage.rewards = context, spec, rewards
        self.eos_token_ids = stops
        self.reward_func_names = [reward.name for reward in rewards]
        if spec.max_kl is not None:
            self.stage.bound = KlBound(self, spec.max_kl)
            self.add_callback(self.stage.bound)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batches of an optimizer step, with completions of the feed's prompts (a hook of transformers)."""
        indices, _ = transformers.Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)
        self._take_up()
        counted = self.stage.feed.even.counted(self.stage.feed.division.rows)
        drawn = [prompt_row(self.train_dataset[index]) for batch in indices for index in batch]
        self.stage.asked = drawn, [int(key) for part, _ in counted for key in part]
        if self.state.global_step % self.num_iterations == 0 or self.stage.answered is None:
            self.stage.answered = self._cut(self._scored(), counted)
            if self.stage.bound is not None:
                self.stage.bound.remember()
        self.stage.feed.keep = self._keep
        self.count([_counted(batch) for batch in self.stage.answered])
        return self.stage.answered, None

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """Return the inputs unchanged, because their completions exist already (a hook of TRL)."""
        return inputs

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Return the tokens of the current prompts, which are tokenized already (a hook of TRL)."""
        return [row.ids for row in self.stage.asked[0] for _ in range(self.num_generations)], None, {}

    def _generate_single_turn(self, prompt_ids: Any, images: Any, fields: Any, *rest: Any) -> Any:
        """Generate completions for prompts, each of which occurs `num_generations` times (a hook of TRL).

        TRL's own sampling depends on which completions share a batch.
        """
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, images, fields, *rest)
        rows, keys = self.stage.asked
        seed = self.stage.spec.seed * SEEDS + self.state.global_step // self.num_iterations
        at = self.stage.spec.per_device_train_batch_size
        ids = [row.ids for row in rows]
        found = generate_completions(
            self, ids, keys, seed, sampling_options(self.stage.spec.generation), self.num_generations, at
        )
        tokens = [completion.tokens for completion in found]
        return (tokens, None) if rest else tokens

    def _calculate_rewards(self, inputs: Any, prompts: list[Any], completions: list[Any], ids: list[list[int]]) -> Any:
        """Return the rewards of all workers' completions, [completions, rewards], NaN for None (a hook of TRL)."""
        columns = columns_of([{name: one[name] for name in one if name != "prompt"} for one in inputs])
        own = {"trainer_state": self.state, "log_extra": self._log_completion_extra, "log_metric": self._log_metric}
        values = [reward(prompts, completions, completion_ids=ids, **columns | own) for reward in self.stage.rewards]
        answers = zip(*values, strict=True)
        table = torch.tensor([[torch.nan if one is None else one for one in answer] for answer in answers])
        return self.accelerator.gather(table.to(self.accelerator.device))

    def _scored(self) -> Batch:
        """Return completions of the current prompts with their advantages, in the form of TRL's loss.

        The completions of one prompt are adjacent.
        """
        self.model.train()
        whole: Batch = self._generate_and_score_completions(
            [{"prompt": row.prompt, **row.fields} for row in self.stage.asked[0] for _ in range(self.num_generations)]
        )
        length = float(self._metrics["train"]["completions/mean_length"][-1])
        if self.stage.spec.algorithm == "rloo":
            self._per_answer(length)
        return whole | {"length": torch.tensor(length)}

    def _cut(self, whole: Batch, counted: list[tuple[torch.Tensor, torch.Tensor]]) -> list[Batch]:
        """Return a batch for each forward pass, weighted so that every prompt of the step counts equally.

        This holds for any number of workers and passes. Repeated prompts that fill a batch do not count.
        """
        each, passes, device = self.num_generations, len(counted), self.accelerator.device
        real = torch.cat([real for _, real in counted]).repeat_interleave(each).to(device)
        if self.stage.spec.algorithm == "grpo":  # its loss is a mean over completion tokens
            whole["completion_mask"] = whole["completion_mask"] * real[:, None]
            tokens = self.accelerator.gather(whole["completion_mask"].sum()).sum()
            whole["num_items_in_batch"] = tokens * self.args.steps_per_generation / passes
        else:  # RLOO's loss is a mean over completions, proportional to the advantages
            rows, workers = self.stage.feed.division.rows, self.accelerator.num_processes
            weights = [workers * passes * len(part) / rows for part, _ in counted]
            lengths = torch.tensor([len(part) * each for part, _ in counted])
            spread = torch.tensor(weights).repeat_interleave(lengths).to(device)
            whole["advantages"] = whole["advantages"] * spread * real
        starts = [sum(len(part) for part, _ in counted[:number]) * each for number in range(passes + 1)]
        return [_slice(whole, start, end) for start, end in pairwise(starts)]

    def _compute_loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        """Return TRL's loss. GRPO's loss also records the KL, which is then converted to nats per completion."""
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        if self.stage.spec.algorithm == "grpo":
            self._per_answer(float(inputs["length"]))
        return loss

    def _per_answer(self, length: float) -> None:
        """Convert TRL's last KL from nats per token to nats per completion of mean length `length`; keep both."""
        measured = self._metrics["train"]
        if self.beta:
            measured["kl_per_token"].append(measured["kl"][-1])
            measured["kl"][-1] *= length

    def kl_of_step(self) -> float | None:
        """Return the KL divergence of the model before the last update from the reference, in nats per completion.

        None if the step generated no completions, and so measured no divergence.
        """
        if self.state.global_step % self.num_iterations != 1 % self.num_iterations:
            return None
        passes = len(self.stage.answered or ()) if self.stage.spec.algorithm == "grpo" else 1
        recent = self._metrics["train"]["kl"][-passes:]
        kl: float = sum(recent) / len(recent)
        return kl

    def kl_now(self) -> float:
        """Return `kl_of_step` for the current weights, on new completions of the last step's prompts."""
        logged = {name: list(values) for name, values in self._metrics["train"].items()}
        seen = self.state.num_input_tokens_seen
        whole = self._scored()
        if self.stage.spec.algorithm == "grpo":
            with torch.no_grad():
                self._compute_loss(self.model, whole)
        kl = float(self._metrics["train"]["kl"][-1])
        self._metrics["train"].clear()
        self._metrics["train"].update(logged)
        self.state.num_input_tokens_seen = seen
        return kl

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's metrics without `step_time`."""
        self._metrics["train"].pop("step_time", None)
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return mean rewards of one completion per held-out prompt. Every worker calls this, with the same result."""
        with self.stage.paused():
            sums = self.accelerator.reduce(self._held_out(), reduction="sum").tolist()
        self.model.eval()
        names = ["reward", *(f"rewards/{reward.name}" for reward in self.stage.rewards), "length"]
        means = {f"eval_{name}": sums[2 * at] / max(sums[2 * at + 1], 1) for at, name in enumerate(names)}
        self.log(means)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, means)  # type: ignore[has-type]
        return means

    def _held_out(self) -> torch.Tensor:
        """Return the sum and the count of each metric over this worker's held-out prompts."""
        rank, workers, data = self.accelerator.process_index, self.accelerator.num_processes, self.eval_dataset
        # ZeRO-3 needs equally many prompts on every worker; `real` excludes repeated ones.
        keys = [(rank + at) % len(data) for at in range(0, len(data), workers)]
        real = [rank + at < len(data) for at in range(0, len(data), workers)]
        rows = [prompt_row(data[key]) for key in keys]
        seed, at = self.stage.spec.seed * SEEDS + HELD_OUT, self.stage.spec.per_device_eval_batch_size
        found = generate_completions(
            self, [row.ids for row in rows], keys, seed, sampling_options(self.stage.spec.generation), 1, at
        )
        tokens = [completion.tokens for completion in found]
        values = self._worth(rows, [completion.text for completion in found], tokens)
        total = weighted(values, [reward.weight for reward in self.stage.rewards])
        columns: list[list[Any]] = [total, *values, [len(one) for one in tokens]]
        totals = [number for column in columns for number in _sum_and_count(column, real)]
        return torch.tensor(totals, dtype=torch.float32, device=self.accelerator.device)

    def _worth(self, rows: list[PromptRow], texts: list[str], ids: list[list[int]]) -> list[list[float | None]]:
        prompts = [row.prompt for row in rows]
        completions = [row.completion(text) for row, text in zip(rows, texts, strict=True)]
        columns = columns_of([row.fields for row in rows])
        own = {"trainer_state": self.state, "log_extra": _ignore, "log_metric": _ignore}
        return [reward(prompts, completions, completion_ids=ids, **columns | own) for reward in self.stage.rewards]

    def _keep(self, step: int, directory: Path) -> None:
        """Write the completions and the weights of the KL bound into a checkpoint."""
        rank = self.stage.context.placement.rank
        if self.stage.bound is not None:
            self.stage.bound.save(directory, rank)
        if step % self.num_iterations and self.stage.answered is not None:
            save_file(_flat(self.stage.answered), directory / ANSWERS.format(rank))

    def _take_up(self) -> None:
        """Load what `_keep` wrote into the checkpoint to resume from, before the first step."""
        directory, self.stage.feed.checkpoint = self.stage.feed.checkpoint, None
        if directory is None:
            return
        if self.stage.bound is not None:
            self.stage.bound.load(directory, self.stage.context.placement.rank)
        place = self.stage.context.placement
        there = [(directory / ANSWERS.format(rank)).is_file() for rank in range(place.world_size + 1)]
        if all(there[:-1]) and not there[-1]:  # else the world size has changed: generate again
            path = directory / ANSWERS.format(place.rank)
            self.stage.answered = _batches(load_file(path), self.accelerator.device)

    def final_metrics(self) -> dict[str, float]:
        """Return the step and the KL at which the bound was exceeded, or nothing if it was not."""
        if self.stage.bound is None or self.stage.bound.passed is None:
            return {}
        step, kl = self.stage.bound.passed
        return {"kl_passed_at_step": float(step), "kl_passed": kl}


def _slice(whole: Batch, start: int, end: int) -> Batch:
    return {name: one[start:end] if one.ndim else one for name, one in whole.items()}


def _sum_and_count(column: list[float | None], real: list[bool]) -> tuple[float, float]:
    kept = [one for one, counts in zip(column, real, strict=True) if counts and one is not None]
    return float(sum(kept)), float(len(kept))


def _flat(batches: list[Batch]) -> Batch:
    """Return the batches as one mapping of tensors that share no memory, as safetensors requires."""
    return {f"{number}/{name}": one.clone() for number, batch in enumerate(batches) for name, one in batch.items()}


def _batches(flat: Batch, device: torch.device) -> list[Batch]:
    count = 1 + max(int(name.partition("/")[0]) for name in flat)
    parts: list[Batch] = [{} for _ in range(count)]
    for name, one in flat.items():
        number, _, field = name.partition("/")
        parts[int(number)][field] = one.to(device)
    return parts


def _counted(batch: Batch) -> dict[str, Any]:
    """Return a batch in the form that `count` expects."""
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return {"input_ids": mask, "attention_mask": mask}


def _ignore(*_: Any) -> None:
    """Discard what a reward function logs outside training."""
