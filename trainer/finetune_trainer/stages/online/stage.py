"""Iterative preference tuning on the model's own completions (arXiv 2312.16682), full or with LoRA adapters."""

from __future__ import annotations

from typing import Any

import trl

from finetune_api.stages import OnlineSpec, Reward
from finetune_trainer.data import PreferenceCollator
from finetune_trainer.endpoint.journal import Journal
from finetune_trainer.plan.rounds import schedule
from finetune_trainer.rewards.endpoint_judge import EndpointJudge
from finetune_trainer.rewards.from_spec import load_rewards
from finetune_trainer.rewards.judge import Ranks, RewardJudge
from finetune_trainer.stage_graph import scratch
from finetune_trainer.stages.online.round_trainer import RoundTrainer
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.adapter_model import adapted_model, adapted_trainer, fresh_adapter
from finetune_trainer.training.arguments import loss_arguments, training_arguments
from finetune_trainer.training.context import StageContext


class OnlineTrainer(RoundTrainer, trl.DPOTrainer):
    """TRL's DPOTrainer on pairs that are made at the beginning of each round."""


def make_trainer(context: StageContext) -> Any:
    """Return the trainer of an `online` stage."""
    spec = context.spec
    assert isinstance(spec, OnlineSpec)
    rows: Any = context.data.train
    rounds = schedule(spec, len(rows), context.rows_per_step)
    # Create the arguments before the model: with ZeRO-3 they enable sharded loading. The pairs
    # contain the reference's log-probabilities, hence `precompute_ref_log_probs`.
    common = training_arguments(context) | {"max_steps": rounds.total, "num_train_epochs": 1}
    args = trl.DPOConfig(**common, **loss_arguments(spec), precompute_ref_log_probs=True, max_length=None)
    adapted = fresh_adapter(context) if spec.lora is None else adapted_model(context)
    second = fresh_adapter(context)[0] if spec.lora is None and spec.reference == "start" else None
    collator = PreferenceCollator(context.tokenizer.pad_token_id)
    trainer = adapted_trainer(OnlineTrainer, context, *adapted, args, ref_model=second, data_collator=collator)
    trainer.begin(context, spec, rounds, _judge(context, spec, args.device))
    return trainer


def _judge(context: StageContext, spec: OnlineSpec, device: Any) -> Ranks:
    where = f"{context.where}.judge"
    if spec.judge.endpoint is not None:
        return EndpointJudge(spec.judge.endpoint, f"{where}.endpoint", spec.judge.criteria, lambda: _journal(context))
    reward = Reward(**{name: getattr(spec.judge, name) for name in ("stage", "model", "function")})
    return RewardJudge(load_rewards([reward], context.run, where, context.precision.compute, device)[0])


def _journal(context: StageContext) -> Journal:
    """Return the journal of the judge's requests and answers, of all workers."""
    rank, own = context.placement.rank, scratch(context.run, context.layout.index)
    return Journal(Storage(context.run.root), context.layout.judgements, own / f"judge-{rank}", rank)
