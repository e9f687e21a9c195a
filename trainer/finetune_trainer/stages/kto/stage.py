"""Kahneman-Tversky optimization (arXiv 2402.01306), in full or by (quantized) low-rank adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import trl
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from finetune_api.stages.kto import KtoSpec
from finetune_trainer.model.config import context_length
from finetune_trainer.training.adapter_model import adapted_model, adapted_trainer, starting_model
from finetune_trainer.training.arguments import training_arguments
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.held_out import Sums
from finetune_trainer.training.preference_trainer import PreferenceTrainer

Rows = Sequence[dict[str, Any]]
MARGIN, CHOSEN, REJECTED = "rewards/margins", "rewards/chosen", "rewards/rejected"


@dataclass(frozen=True)
class UnpairedCollator:
    """Make a batch as TRL's `DataCollatorForUnpairedPreference` does, with prepared masks of the tokens with loss.

    The batch has int64 `input_ids`, `attention_mask` and `completion_mask` [B, L], and bool `label` [B]. With
    `mismatched` it also has the first three as `KL_...` [B, L'], in which each prompt has the answer of the row before.

    Args:
        max_length: most tokens of a prompt with another row's answer, which is cut. None: no limit.
        mismatched: whether the loss estimates the KL to the reference.
    """

    pad_token_id: int
    max_length: int | None
    mismatched: bool

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        batch = self._texts(rows, rows)
        if self.mismatched:
            others = self._texts(rows, [rows[-1], *rows[:-1]])
            batch |= {f"KL_{name}": value for name, value in others.items()}
        return batch | {"label": torch.tensor([bool(row["label"][0]) for row in rows])}

    def _texts(self, prompts: Rows, answers: Rows) -> dict[str, Tensor]:
        pairs, limit = list(zip(prompts, answers, strict=True)), self.max_length
        ids = [[*prompt["prompt_ids"], *answer["completion_ids"]][:limit] for prompt, answer in pairs]
        masks = [[*[0] * len(prompt["prompt_ids"]), *answer["completion_mask"]][:limit] for prompt, answer in pairs]
        return {
            "input_ids": _padded(ids, self.pad_token_id),
            "attention_mask": _padded([[1] * len(one) for one in ids], 0),
            "completion_mask": _padded(masks, 0),
        }


class KtoTrainer(PreferenceTrainer, trl.KTOTrainer):
    """TRL's KTOTrainer on prepared rows."""

    sequences_per_row = 1

    def measure(self, model: Any, inputs: dict[str, Any]) -> Sums:
        """Return TRL's metrics of held-out rows as sums, without a mixture of experts' balance loss.

        The KL is estimated from the rows of each batch, so it depends on the batch size.
        """
        loss, means = self.held_out_loss(model, inputs)
        return kto_sums(loss, means, inputs["label"], inputs["completion_mask"])

    def finish_means(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means with the margin of the rewards, where there are answers of both kinds."""
        if CHOSEN not in means or REJECTED not in means:
            return means
        return means | {MARGIN: means[CHOSEN] - means[REJECTED]}


def kto_sums(loss: Tensor, means: dict[str, float], labels: Tensor, mask: Tensor) -> Sums:
    """Return the sums of what TRL's KTOTrainer measures on a batch.

    Args:
        loss: mean over the rows.
        means: TRL's metrics by name: of the good answers, of the bad ones, or of all.
        labels: bool [B], true for good answers.
        mask: `completion_mask` [B, L].
    """
    tokens, good = mask[:, 1:].sum(1), labels.bool()
    rows = len(labels)
    sums: dict[str, tuple[Tensor | float, Tensor | float]] = {
        "loss": (loss * rows, rows),
        "kl": (means["kl"] * rows, rows),
        "entropy": (means["entropy"] * tokens.sum(), tokens.sum()),
    }
    for side, chosen in (("chosen", good), ("rejected", ~good)):
        for name, weight in (("rewards", chosen.sum()), ("logps", chosen.sum()), ("logits", tokens[chosen].sum())):
            sums[f"{name}/{side}"] = (means.get(f"{name}/{side}", 0.0) * weight, weight)
    return sums


def make_trainer(context: StageContext) -> Any:
    """Return the trainer of a `kto` stage."""
    spec = context.spec
    assert isinstance(spec, KtoSpec)
    # The arguments come first: with ZeRO-3 they divide the model among the workers while it loads.
    args = trl.KTOConfig(
        **training_arguments(context),
        beta=spec.beta,
        loss_type=spec.loss_type,
        desirable_weight=spec.desirable_weight,
        undesirable_weight=spec.undesirable_weight,
        max_length=None,
    )
    adapted = adapted_model(context)
    limit = spec.max_length or context_length(context.config)
    collator = UnpairedCollator(context.tokenizer.pad_token_id, limit, mismatched=spec.loss_type == "kto")
    reference = starting_model(context) if spec.lora is None else None
    return adapted_trainer(KtoTrainer, context, *adapted, args, ref_model=reference, data_collator=collator)


def _padded(values: list[list[int]], filler: int) -> Tensor:
    return pad_sequence([torch.tensor(value) for value in values], batch_first=True, padding_value=filler)
