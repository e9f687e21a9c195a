"""Means over held-out rows and over a step's rows count each token or pair once, for any batch size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs.in_process import open_stage, trained
from support.jobs.plain_means import scored, token_means
from support.jobs.tiny_rows import dialogue
from torch.nn import functional
from transformers import AutoModelForCausalLM

from finetune_trainer.training.held_out import share

Job = dict[str, Any]
CLOSE = 1e-5
BATCH_SIZES = (1, 2, 3, 7)
ROWS = [dialogue(f"{n} plus {n}", " ".join(str(m) for m in range(1 + (n * n) % 11))) for n in range(7)]
PAIRS = [
    {"prompt": f"{n} plus 1", "chosen": " makes" * (1 + n % 3) + f" {n}", "rejected": f" says {n}" * (1 + n * n % 5)}
    for n in range(7)
]


def stage(kind: str, rows: list[Job], **fields: Any) -> Job:
    """Return a stage with a learning rate of 0."""
    data = {"sources": [{"inline": rows}]}
    common = {"data": data, "evalData": data, "maxSteps": 1, "learningRate": 0.0, "perDeviceTrainBatchSize": 8}
    length = {} if kind == "pretrain" else {"maxLength": 64}
    return {kind: {**common, **length, **fields}}


@pytest.fixture
def measured(base_job: Job, tmp_path: Path) -> Callable[..., list[dict[str, float]]]:
    """Return a function that evaluates a stage's model with each batch size and returns the metrics of each."""

    def measure(one: Job) -> list[dict[str, float]]:
        base_job["spec"]["stages"] = [one]
        found = []
        with trained(open_stage(base_job, tmp_path)) as trainer:
            for size in BATCH_SIZES:
                trainer.args.per_device_eval_batch_size = size
                found.append(trainer.evaluate())
        return found

    return measure


Measured = Callable[..., list[dict[str, float]]]


def _same(found: list[dict[str, float]], names: set[str]) -> None:
    for one in found:
        assert {
            name.removeprefix("eval_") for name in one if not name.endswith(("runtime", "second", "time"))
        } == names | {"epoch"}
        for name in names:
            assert one[f"eval_{name}"] == pytest.approx(found[-1][f"eval_{name}"], abs=CLOSE), name


@pytest.mark.parametrize("packing", [False, True])
def test_tokens(packing: bool, base_job: Job, tiny_model: Path, tmp_path: Path, measured: Measured) -> None:
    """Each batch size gives the mean over all assistant tokens, as plain transformers computes it row by row."""
    found = measured(stage("sft", ROWS, packing=packing))
    _same(found, {"loss", "entropy", "mean_token_accuracy"})
    base_job["spec"]["stages"] = [stage("sft", ROWS)]
    rows = open_stage(base_job, tmp_path).data.eval
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    true = token_means(model, rows)
    assert [found[0][name] for name in true] == pytest.approx(list(true.values()), abs=CLOSE)
    per_row = sum(functional.cross_entropy(*scored(model, row)).item() for row in rows) / len(rows)
    assert abs(per_row - true["eval_loss"]) > 100 * CLOSE  # the mean of the rows' means is different


@pytest.mark.parametrize("fields", [{}, {"lossType": ["sigmoid", "sft"], "lossWeights": [0.5, 2.0], "lora": {"r": 2}}])
def test_pairs(fields: Job, measured: Measured) -> None:
    rewards = {f"rewards/{one}" for one in ("chosen", "rejected", "accuracies", "margins")}
    answers = {f"{one}/{side}" for one in ("logits", "logps") for side in ("chosen", "rejected")}
    names = {"loss", "entropy", "mean_token_accuracy"} | rewards | answers
    _same(measured(stage("dpo", PAIRS, **fields)), names)


def test_rewards(measured: Measured) -> None:
    _same(measured(stage("reward", PAIRS)), {"loss", "accuracy", "margin", "mean_reward"})


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_blocks(objective: str, measured: Measured, base_job: Job, tmp_path: Path) -> None:
    if objective == "masked":
        config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        base_job["spec"]["model"] = {
            "config": config | {"intermediate_size": 32},
            "tokenizer": base_job["spec"]["model"]["path"],
        }
    rows = [{"text": f"{n} plus {n} makes {n + n}. " * 6} for n in range(7)]
    found = measured(stage("pretrain", rows, blockSize=32, objective=objective))
    _same(found, {"loss"} if objective == "masked" else {"loss", "entropy", "mean_token_accuracy"})


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_training_loss(kind: str, base_job: Job, tmp_path: Path) -> None:
    """Steps whose 7 rows are split into passes of 4 and 3 have the losses and gradients of 7 rows at once."""
    learning = {"maxSteps": 3, "learningRate": 3e-3, "lrSchedulerType": "constant", "warmupSteps": 0}
    losses = []
    for size, accumulation in ((7, 1), (4, 2)):
        fields = learning | {"perDeviceTrainBatchSize": size, "gradientAccumulationSteps": accumulation}
        base_job["spec"]["stages"] = [stage(kind, ROWS if kind == "sft" else PAIRS, **fields)]
        with trained(open_stage(base_job, tmp_path)) as trainer:
            losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 3 and losses[0][2] < losses[0][0] - 0.01
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize(("rows", "size", "workers"), [(7, 2, 3), (1, 4, 3), (8, 2, 2), (9, 4, 2), (5, 8, 1)])
def test_every_row_on_one_worker(rows: int, size: int, workers: int) -> None:
    shares = [share(rows, size, workers, rank) for rank in range(workers)]
    assert len({len(batches) for batches, _ in shares}) == 1
    assert all(0 < len(batch) <= size for batches, _ in shares for batch in batches)
    counted = [row for one in shares for batch, counts in zip(*one, strict=True) if counts for row in batch]
    assert sorted(counted) == list(range(rows))
