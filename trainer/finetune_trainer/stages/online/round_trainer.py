"""Trainer of all rounds of an `online` stage, which share one optimizer and one learning rate schedule."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_api.problems import Problem
from finetune_api.stages import OnlineSpec
from finetune_trainer.errors import UserError
from finetune_trainer.plan.rounds import Schedule
from finetune_trainer.rewards.judge import Ranks, best_and_worst, win_rate
from finetune_trainer.stage_graph import place
from finetune_trainer.stages.online.round_files import RoundFiles
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.answers import SEEDS, PromptRow, generate_completions, prompt_row, sampling_options
from finetune_trainer.training.collectives import Collectives
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.preference_trainer import PreferenceTrainer
from finetune_trainer.training.prompt_feed import PromptFeed
from finetune_trainer.training.trainer_extensions import TrainerExtensions

Json = dict[str, Any]
HELD_OUT = SEEDS - 1
"""Offset of the seed for completions of held-out prompts; rounds use the offsets below."""


@dataclass
class RoundExtensions(TrainerExtensions):
    """State that an `online` stage adds to its trainer."""

    feed: PromptFeed = field(init=False)
    context: StageContext = field(init=False)
    spec: OnlineSpec = field(init=False)
    schedule: Schedule = field(init=False)
    judge: Ranks = field(init=False)
    files: RoundFiles = field(init=False)
    collectives: Collectives = field(init=False)
    pairs: list[Json] = field(init=False)
    """Pairs of round `made`."""
    made: int = -1
    """Round whose pairs are loaded, or -1."""


class RoundTrainer(PreferenceTrainer):
    """Mixin over TRL's DPOTrainer that makes a round's pairs at its first step, and saves them in storage.

    A completion depends on the stage's seed, the round and the prompt's position in it, not on the worker. The
    reference's log-probabilities are computed with the pairs, so training a round needs no reference forward pass.
    """

    stage: RoundExtensions
    makes_pairs = True

    @staticmethod
    def new_extensions() -> RoundExtensions:
        """Return the initial value of `stage`."""
        return RoundExtensions()

    def begin(self, context: StageContext, spec: OnlineSpec, schedule: Schedule, judge: Ranks) -> None:
        """Set the state that TRL's constructor has no arguments for."""
        stage = self.stage
        stage.context, stage.spec, stage.schedule, stage.judge = context, spec, schedule, judge
        stage.files, stage.collectives = RoundFiles(Storage(context.run.root), context.layout), Collectives()
        if context.resumed is None and context.placement.rank == 0:
            stage.files.begin(context.data.key.train)
        stage.collectives.barrier()
        self.add_callback(RoundsCallback(self))

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Return the dataset unchanged, because there are no pairs yet (a hook of TRL)."""
        return dataset

    def get_train_dataloader(self) -> Any:
        """Return a loader of indices, by which transformers counts steps; `get_batch_samples` supplies the pairs."""
        return self.stage.feed.loader(range(self.stage.schedule.total * self.stage.feed.division.rows), list)  # type: ignore[arg-type]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batches of an optimizer step, from the current round's pairs (a hook of transformers)."""
        transformers.Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)
        number, step = self.stage.schedule.at(self.state.global_step)
        if self.stage.made != number:
            with self.stage.paused():
                self._begin_round(number)
        if not self.stage.pairs:
            self._end(number)
            return [], None
        rows = self.stage.feed.division.rows
        mine = self.stage.schedule.pairs_of(number, step, len(self.stage.pairs), rows)
        batches = [
            self.data_collator([self.stage.pairs[mine[place]] for place in places.tolist()])
            for places in self.stage.feed.division.share(rows)
        ]
        self.count(batches)
        return batches, None

    def rows_of(self, step: int, rank: int | None = None, number: int = 0) -> list[int]:
        """Return the rows of a step, as in `StageTrainer`; rows are pairs of the current round."""
        round_at, at = self.stage.schedule.at(step)
        division = self.stage.feed.division
        mine = self.stage.schedule.pairs_of(round_at, at, len(self.stage.pairs), division.rows)
        if rank is None:
            return [int(pair) for pair in mine]
        return [int(mine[place]) for place in replace(division, rank=rank).share(division.rows)[number].tolist()]

    def _begin_round(self, number: int) -> None:
        """Load a round's pairs from storage, or make them."""
        pairs = self.stage.files.pairs(number)
        if pairs is None:
            samples = self._samples(number)
            pairs = self._referenced(_pairs(samples, self._rows(number)))
            self._keep(number, samples, pairs)
        self.stage.pairs, self.stage.made = pairs, number

    def _end(self, number: int) -> None:
        """Stop training with the current model, because a round has no pairs to train on.

        Raises:
            UserError: it is the first round.
        """
        message = f"ranks all answers to the {self.stage.schedule.prompts} prompts of round {number + 1} alike"
        if number == 0:
            where = f"{place(self.stage.context.run, self.stage.context.layout.index)}.judge"
            raise UserError([Problem(where, f"{message}: there is nothing to learn")])
        if self.stage.io is not None:
            self.stage.io.log(f"the judge {message}: the stage ends here")
        self.control.should_training_stop = True

    def _rows(self, number: int) -> list[PromptRow]:
        return [prompt_row(self.train_dataset[index]) for index in self.stage.schedule.prompts_of(number)]

    def _samples(self, number: int) -> list[Json]:
        """Return ranked completions of a round's prompts. Workers divide the parts, and save each one when done."""
        size, rows = self.stage.spec.per_device_train_batch_size, self._rows(number)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        there = self.stage.files.parts(number)
        self.stage.collectives.barrier()  # no worker writes before all have listed the missing parts
        missing = [part for part in range(len(parts)) if part not in there]
        rank, workers = self.stage.context.placement.rank, self.stage.context.placement.world_size
        for turn in range(0, len(missing), workers):
            mine = missing[min(turn + rank, len(missing) - 1)]
            # Under ZeRO-3 every worker generates in every turn; a duplicate part is not written.
            if turn + rank < len(missing) or self.stage.context.zero == 3:
                answered = self._ranked(parts[mine], mine * size, number)
                if turn + rank < len(missing):
                    self.stage.files.write_part(number, mine, answered)
            self._tell(number, min(turn + workers, len(missing)), len(missing))
        self.stage.collectives.barrier()
        return self.stage.files.read_parts(number)

    def _ranked(self, rows: list[PromptRow], first: int, number: int) -> list[Json]:
        """Return completions of some of a round's prompts, with their tokens and their scores by the judge."""
        each, keys = self.stage.spec.num_generations, list(range(first, first + len(rows)))
        seed = self.stage.spec.seed * SEEDS + number
        options = sampling_options(self.stage.spec.generation)
        found = generate_completions(self, [row.ids for row in rows], keys, seed, options, each, len(rows))
        groups = [found[start : start + each] for start in range(0, len(found), each)]
        answers = [[row.completion(one.text) for one in group] for row, group in zip(rows, groups, strict=True)]
        ids = [[one.tokens for one in group] for group in groups]
        scores = self.stage.judge([row.prompt for row in rows], answers, ids, [row.fields for row in rows])
        return [
            {"prompt": key, "answers": [one.text for one in group], "tokens": tokens, "scores": ranked}
            for key, group, tokens, ranked in zip(keys, groups, ids, scores, strict=True)
        ]

    def _tell(self, number: int, done: int, parts: int) -> None:
        """Log the progress of a round's completions, and stop if the driver requests it; written parts are kept."""
        if self.stage.io is None:
            return
        self.stage.io.log(f"round {number + 1} of {self.stage.schedule.rounds}: answers, part {done} of {parts}")
        self.stage.io.stop_together()

    def _referenced(self, pairs: list[Json]) -> list[Json]:
        """Return all pairs with the reference's log-probabilities, on every worker."""
        rank, workers, size = self.stage.context.placement.rank, self.stage.context.placement.world_size, len(pairs)
        if not pairs:
            return []
        each = -(-size // workers)
        mine = [(rank * each + at) % size for at in range(each)]
        batch = self.stage.spec.per_device_train_batch_size
        found = [self._reference([pairs[at] for at in mine[start : start + batch]]) for start in range(0, each, batch)]
        table = self.accelerator.gather(torch.cat(found).float())[:size].tolist()
        return [
            {**pair, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            for pair, (chosen, rejected) in zip(pairs, table, strict=True)
        ]

    def _reference(self, pairs: list[Json]) -> torch.Tensor:
        """Return the log-probabilities of the chosen and the rejected completions, [n, 2]."""
        inputs = self._prepare_inputs(self.data_collator(pairs))
        self.model.eval()
        if self.stage.spec.reference == "start":
            both = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        else:
            both = self._own_log_probs(inputs)
        self.model.train()
        return torch.stack(both, dim=1)

    def _own_log_probs(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return what TRL's `compute_ref_log_probs` returns, but of the model in training."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), self.accelerator.autocast():
            output = self.model(**texts, use_cache=False, labels=labels, fused_lm_head=True)
        chosen, rejected = output.log_probs.sum(dim=1).chunk(2, dim=0)
        return chosen, rejected

    def _keep(self, number: int, samples: list[Json], pairs: list[Json]) -> None:
        scores = [score for row in samples for score in row["scores"] if score is not None]
        facts: dict[str, Any] = {
            "prompts": len(samples),
            "pairs": len(pairs),
            "ties": len(samples) - len(pairs),
            "reward": sum(scores) / len(scores) if scores else None,
        }
        for name in ("pairs", "ties", "reward"):
            if facts[name] is not None:
                self._metrics["train"][f"round/{name}"].append(float(facts[name]))
        if self.stage.context.placement.rank == 0:
            self.stage.files.finish(number, samples, pairs)
            self.stage.files.record(number, facts)
        self.stage.collectives.barrier()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Compare the model with the stage's starting model on held-out prompts; every worker gets the same result."""
        with self.stage.paused():
            sums = self.accelerator.reduce(self._held_out(), reduction="sum").tolist()
        means = {"eval_reward": sums[0] / max(sums[1], 1), "eval_length": sums[4] / max(sums[5], 1)}
        if self.state.global_step:
            means["eval_win_rate"] = sums[2] / max(sums[3], 1)
            number = self.stage.schedule.at(self.state.global_step - 1)[0]
            if self.stage.context.placement.rank == 0 and self.state.global_step % self.stage.schedule.steps == 0:
                facts = {"win_rate": means["eval_win_rate"], "eval_reward": means["eval_reward"]}
                self.stage.files.record(number, facts)
        self.model.eval()
        self.log(means)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, means)  # type: ignore[has-type]
        return means

    def _held_out(self) -> torch.Tensor:
        """Return sums and counts of rewards, wins and lengths over this worker's held-out prompts, float32 [6]."""
        worker, data = self.stage.context.placement, self.eval_dataset
        rank, workers = worker.rank, worker.world_size
        # ZeRO-3 needs equally many prompts on every worker; `real` excludes repeated ones.
        keys = [(rank + at) % len(data) for at in range(0, len(data), workers)]
        real = [rank + at < len(data) for at in range(0, len(data), workers)]
        rows = [prompt_row(data[key]) for key in keys]
        seed, at = self.stage.spec.seed * SEEDS + HELD_OUT, self.stage.spec.per_device_eval_batch_size
        found = generate_completions(
            self, [row.ids for row in rows], keys, seed, sampling_options(self.stage.spec.generation), 1, at
        )
        now = [{"text": one.text, "tokens": one.tokens} for one in found]
        start = self._start(keys, now, real)
        groups = [[start.get(key, mine), mine] for key, mine in zip(keys, now, strict=True)]
        answers = [[row.completion(one["text"]) for one in group] for row, group in zip(rows, groups, strict=True)]
        ids = [[one["tokens"] for one in group] for group in groups]
        scores = self.stage.judge([row.prompt for row in rows], answers, ids, [row.fields for row in rows])
        kept = [pair for pair, counts in zip(scores, real, strict=True) if counts]
        rewards, wins = [after for _, after in kept if after is not None], win_rate(kept)
        lengths = [len(one["tokens"]) for one, counts in zip(now, real, strict=True) if counts]
        totals = [float(number) for column in (rewards, wins, lengths) for number in (sum(column), len(column))]
        return torch.tensor(totals, dtype=torch.float32, device=self.accelerator.device)

    def _start(self, keys: list[int], now: list[Json], real: list[bool]) -> dict[int, Json]:
        """Return the starting model's completions by prompt; the first evaluation, before training, saves them."""
        known = self.stage.files.start()
        self.stage.collectives.barrier()
        if known is None:
            mine = [{"key": key, **one} for key, one, counts in zip(keys, now, real, strict=True) if counts]
            everyone: list[list[Json]] = self.stage.collectives.gather(mine)
            known = sorted((row for rows in everyone for row in rows), key=lambda row: row["key"])
            if self.stage.context.placement.rank == 0:
                self.stage.files.write_start(known)
            self.stage.collectives.barrier()
        return {row["key"]: row for row in known}


class RoundsCallback(TrainerCallback):
    """Save a checkpoint and evaluate at the end of each round."""

    def __init__(self, trainer: RoundTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.trainer.stage.schedule.steps or state.global_step >= state.max_steps:
            return
        control.should_save = True
        control.should_evaluate = self.trainer.eval_dataset is not None


def _pairs(samples: list[Json], rows: list[PromptRow]) -> list[Json]:
    """Return preference rows of the best and the worst completion of each prompt, if they differ."""
    pairs = []
    for sample in samples:
        places = best_and_worst(sample["scores"])
        if places is None:
            continue
        chosen, rejected = (sample["tokens"][place] for place in places)
        if chosen != rejected:
            sides = {"chosen_ids": chosen, "rejected_ids": rejected}
            masks = {"chosen_mask": [1] * len(chosen), "rejected_mask": [1] * len(rejected)}
            pairs.append({"prompt_ids": rows[sample["prompt"]].ids, **sides, **masks})
    return pairs
