"""Choice of the experts that an `esft` stage trains: configured, from an earlier attempt, or by measured scores."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedModel

from finetune_api.stages import EsftSpec
from finetune_trainer.esft.families import expert_layers
from finetune_trainer.esft.load_report import load_report
from finetune_trainer.esft.scores import ExpertScores, measure_scores
from finetune_trainer.esft.selection import ExpertConfig, config_from, select_layers
from finetune_trainer.esft.zero3 import gathering
from finetune_trainer.model.expert_selection import load_expert_config
from finetune_trainer.stages.esft.expert_sample import sample_batches, share
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.context import StageContext


class ExpertChoice:
    """The chosen experts of a stage and the report of their load, saved in the stage's directory in storage."""

    def __init__(self, context: StageContext, spec: EsftSpec, model: PreTrainedModel) -> None:
        self.context, self.spec = context, spec
        self.storage = Storage(context.run.root)
        self.where = context.where
        self.sizes = {layer.index: layer.num_experts for layer in expert_layers(model, self.where)}
        self.batches = sample_batches(
            context.data.train, spec.sample_tokens, spec.per_device_train_batch_size, spec.seed
        )
        self.before: dict[str, Any] = {}

    def choose(self, model: PreTrainedModel) -> ExpertConfig:
        """Return the experts to train. Every worker calls this and gets the same result; rank 0 saves it.

        Raises:
            UserError: the configured experts do not match the model.
        """
        layout = self.context.layout
        if self._chosen_before():
            # The checkpoints of the earlier attempt contain these experts.
            return config_from(json.loads(self.storage.read_text(layout.expert_config)), layout.expert_config)
        scores = self.measure(model)
        config = self._given() or self._selected(scores)
        self.before = load_report(scores, config) | {"data": self.context.data.key.train}
        self._write(config)
        return config

    def _chosen_before(self) -> bool:
        """Load an earlier attempt's report; its choice is valid for the same data, or if a checkpoint contains it."""
        layout = self.context.layout
        if not (self.storage.exists(layout.expert_config) and self.storage.exists(layout.expert_scores)):
            return False
        self.before = json.loads(self.storage.read_text(layout.expert_scores))
        same = self.before.get("data") in (None, self.context.data.key.train)
        return same or self.context.resumed is not None

    def measure(self, model: PreTrainedModel) -> ExpertScores:
        """Return the scores of the experts on the stage's sample."""
        place = self.context.placement
        mine = share(self.batches, place.rank, place.world_size, in_step=self.context.zero == 3)
        with gathering(model):
            return measure_scores(model, mine)

    def measure_after(self, model: PreTrainedModel, config: ExpertConfig) -> dict[str, float]:
        """Measure the trained model, rewrite the report and return final metrics. Every worker calls this."""
        report = load_report(self._measure_trained(model), config)
        self.before["after"] = {name: report[name] for name in ("token_scores", "gate_scores", "balance")}
        self._write_report(config)
        before, after = self.before["balance"]["mean"], report["balance"]["mean"]
        return {"expert_entropy_before": before, "expert_entropy_after": after}

    def _measure_trained(self, model: PreTrainedModel) -> ExpertScores:
        place = self.context.placement
        return measure_scores(model, share(self.batches, place.rank, place.world_size, in_step=self.context.zero == 3))

    def _given(self) -> ExpertConfig | None:
        if self.spec.expert_config is None:
            return None
        return load_expert_config(self.spec, self.where, self.context.run.base_dir, self.sizes)

    def _selected(self, scores: ExpertScores) -> ExpertConfig:
        spec = self.spec
        chosen = select_layers(scores.of(spec.score), spec.top_p)
        notes = {"score": spec.score, "threshold": spec.top_p, "tokens": scores.tokens}
        return ExpertConfig(chosen, spec.train_shared_experts, spec.train_non_experts, notes)

    def _write(self, config: ExpertConfig) -> None:
        if self.context.placement.rank == 0:
            text = json.dumps(config.to_json(), indent=1)
            self.storage.write_text(self.context.layout.expert_config, text)
        self._write_report(config)

    def _write_report(self, config: ExpertConfig) -> None:
        if self.context.placement.rank != 0:
            return
        self.storage.write_text(self.context.layout.expert_scores, json.dumps(self.before))
        from finetune_trainer.esft.heat_map import draw  # matplotlib is slow to import

        self.storage.write_bytes(self.context.layout.expert_load, draw(self.before, self.spec.score))
