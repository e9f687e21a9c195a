"""Masked language modelling: which tokens are masked, in which proportions, and that a model learns to predict them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs.in_process import open_stage, trained
from support.jobs.tiny_rows import TEXTS
from transformers import AutoModelForMaskedLM, AutoTokenizer

from finetune_trainer.stages.pretrain.masking import MaskingCollator
from finetune_trainer.training.stage_result import save_result

Job = dict[str, Any]
BLOCK, ROWS, PROBABILITY = 64, 4000, 0.15
FOUR_SIGMA = 0.01
"""With 38,000 masked tokens a share of 0.8 has a standard error of 0.002; this is four of them, rounded up."""


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def _rows(count: int, vocabulary: int) -> list[dict[str, Any]]:
    ids = torch.randint(5, vocabulary, (count, BLOCK), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row} for row in ids.tolist()]


def test_proportions(tokenizer: Any) -> None:
    """15% are selected: 80% of them masked, 10% random, 10% kept; all others are unchanged and have no label."""
    rows = _rows(ROWS, len(tokenizer))
    batch = MaskingCollator(tokenizer, PROBABILITY, seed=1)(rows)
    before, after, labels = torch.tensor([row["input_ids"] for row in rows]), batch["input_ids"], batch["labels"]
    hidden = labels != -100
    assert torch.equal(labels[hidden], before[hidden]) and torch.equal(after[~hidden], before[~hidden])
    assert hidden.float().mean().item() == pytest.approx(PROBABILITY, abs=FOUR_SIGMA)
    masked = after[hidden] == tokenizer.mask_token_id
    kept = after[hidden] == before[hidden]
    # A random token sometimes equals the original: one in the vocabulary.
    shares = {"masked": masked, "kept": kept, "random": ~masked & ~kept}
    expected = {"masked": 0.8, "kept": 0.1, "random": 0.1}
    for name, found in shares.items():
        assert found.float().mean().item() == pytest.approx(expected[name], abs=FOUR_SIGMA), name


def test_masks_follow_from_content_seed_and_epoch(tokenizer: Any) -> None:
    rows = _rows(8, len(tokenizer))
    collator = MaskingCollator(tokenizer, PROBABILITY, seed=1)
    first, again = collator(rows), collator(rows)
    assert torch.equal(first["labels"], again["labels"]) and torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["labels"], MaskingCollator(tokenizer, PROBABILITY, seed=2)(rows)["labels"])
    collator.epoch = 1
    assert not torch.equal(first["labels"], collator(rows)["labels"])


def test_it_trains(base_job: Job, tiny_model: Path, tmp_path: Path) -> None:
    """A ModernBERT from scratch gets better than a random guess on held-out rows, and transformers loads the result."""
    config = {"model_type": "modernbert", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
    base_job["spec"]["model"] = {"config": config, "tokenizer": str(tiny_model)}
    data = {"sources": [{"inline": [{"text": text} for text in TEXTS]}], "validationSplit": 0.2}
    stage = {"data": data, "objective": "masked", "blockSize": 32, "maxSteps": 60, "learningRate": 1e-2}
    base_job["spec"]["stages"] = [{"pretrain": stage}]
    context = open_stage(base_job, tmp_path)
    with trained(context, evaluate=True) as trainer:
        before, after = (row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
        assert before > 5 and after < before - 1.5
        save_result(trainer, context, tmp_path / "result")
    AutoModelForMaskedLM.from_pretrained(tmp_path / "result")
