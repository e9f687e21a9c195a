"""Reward models learn a preference, load with plain transformers, and are the same under any sharding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.jobs.in_process import open_stage, trained
from support.jobs.plain_means import pair_means, token_means
from support.jobs.running import done, losses, run, under_each_zero
from support.jobs.tiny_rows import dialogue
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from finetune_cli.main import app
from finetune_trainer.training.stage_result import save_result

Job = dict[str, Any]
CLOSE = 1e-5
"""Tolerance for float32 rewards: other batches and merged adapters add in different orders."""


def pairs(first: int, last: int) -> list[dict[str, Any]]:
    """Return pairs of one or two turns whose polite answer is chosen, whatever the question."""
    rows = []
    for n in range(first, last):
        before = dialogue(f"{n} plus 1", f"makes {n + 1}")["messages"] if n % 2 else []
        ask = [*before, {"role": "user", "content": f"{n} plus {n}"}]
        polite, rude = f"says the teacher {n + n}", f"{n + n}" * (n % 3 + 1)
        rows.append({"chosen": [*ask, _answer(polite)], "rejected": [*ask, _answer(rude)]})
    return rows


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def stage(**fields: Any) -> dict[str, Any]:
    data, held_out = ({"sources": [{"inline": pairs(*span)}]} for span in ((0, 16), (16, 23)))
    common = {"maxLength": 64, "maxSteps": 12, "learningRate": 3e-3, "perDeviceTrainBatchSize": 8}
    return {"reward": {"data": data, "evalData": held_out, "perDeviceEvalBatchSize": 3, **common, **fields}}


@pytest.mark.parametrize("fields", [{}, {"lora": {"r": 4}}, {"lora": {"r": 4}, "quantization": {"bits": 4}}])
def test_learns_and_loads(fields: Job, base_job: Job, tmp_path: Path) -> None:
    base_job["spec"]["stages"] = [stage(**fields)]
    context = open_stage(base_job, tmp_path)
    with trained(context) as trainer:
        measured = trainer.evaluate()
        save_result(trainer, context, tmp_path / "result")
        seen = _rewards(trainer, context.data.eval)
    assert measured["eval_accuracy"] == 1.0 and measured["eval_margin"] > 0.5
    assert measured["eval_margin"] == pytest.approx((seen[:, 0] - seen[:, 1]).mean().item(), abs=CLOSE)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "result")
    assert (model.config.num_labels, model.dtype) == (1, torch.float32)
    scores = torch.tensor([[_score(model, tmp_path / "result", pair[side]) for side in pair] for pair in pairs(16, 23)])
    assert (scores[:, 0] > scores[:, 1]).all()
    if "quantization" not in fields:  # a quantized base is merged in its original precision
        by_row = (values[values[:, 0].argsort()] for values in (scores, seen))  # the data is shuffled
        torch.testing.assert_close(*by_row, atol=CLOSE, rtol=0)


@torch.no_grad()
def _rewards(trainer: Any, rows: Any) -> torch.Tensor:
    """Return the trainer's rewards [rows, 2] of the chosen and the rejected answers."""
    batch = trainer.data_collator(list(rows))
    return torch.stack(trainer.model.eval()(**batch, use_cache=False).logits.squeeze(-1).chunk(2), dim=1)


@torch.no_grad()
def _score(model: Any, directory: Path, messages: list[dict[str, str]]) -> float:
    """Return one dialogue's reward with plain transformers, in a batch of its own."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item()


def test_rewards_are_pulled_towards_zero(base_job: Job, tmp_path: Path) -> None:
    """At a learning rate of 0 the loss grows by the mean square of the pairs' reward sums."""
    losses = []
    for coefficient in (0.0, 10.0):
        still = stage(centerRewardsCoefficient=coefficient, learningRate=0.0, maxSteps=1, perDeviceTrainBatchSize=16)
        base_job["spec"]["stages"] = [still]
        with trained(open_stage(base_job, tmp_path)) as trainer:
            losses.append(trainer.state.log_history[0]["loss"])
            sums = _rewards(trainer, trainer.train_dataset).sum(1)
    assert (sums**2).mean() > 1e-3
    assert losses[1] - losses[0] == pytest.approx(10 * (sums**2).mean().item(), rel=1e-3)  # the log rounds to 4 digits


@pytest.mark.timeout(600)
def test_the_next_stage_starts_before_it(
    base_job: Job, write_job: Callable[[Job], Path], tmp_path: Path, tiny_model: Path
) -> None:
    """An adapter of an earlier stage is merged into the reward model, and continues in the next stage; two workers.

    They share held-out rows and pairs unevenly, and evaluate each once, with the results of plain transformers.
    """
    held_out = {"sources": [{"inline": [dialogue(f"{n} plus 1", f"makes {n}" * (n + 1)) for n in range(5)]}]}
    fields = {"lora": {"r": 4, "merge": False}, "evalData": held_out, "perDeviceEvalBatchSize": 2}
    sft = {"sft": base_job["spec"]["stages"][0]["sft"] | fields}
    after = {"name": "after", "sft": sft["sft"]}
    base_job["spec"]["stages"] = [sft, stage(lora={"r": 8}, maxSteps=8), after]
    base_job["spec"]["resources"] = {"workersPerNode": 2}
    code, output = run(write_job(base_job))
    assert code == 0, output
    stages = tmp_path / "runs/job/stages"
    metrics = done(stages / "01-reward")["metrics"]
    assert metrics["eval_accuracy"] > 0.8
    reward = AutoModelForSequenceClassification.from_pretrained(stages / "01-reward/result")
    scores = [[_score(reward, stages / "01-reward/result", pair[side]) for side in pair] for pair in pairs(16, 23)]
    _same(metrics, pair_means(torch.tensor(scores)))
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), stages / "00-sft/result")
    base_job["spec"]["resources"], base_job["spec"]["stages"] = {}, [sft]
    _same(done(stages / "00-sft")["metrics"], token_means(tuned, open_stage(base_job, tmp_path).data.eval))
    assert json.loads((stages / "02-after/result/adapter_config.json").read_text())["r"] == 4
    answer = CliRunner().invoke(app, ["generate", str(stages / "01-reward"), "--prompt", "1 plus 1"])
    assert answer.exit_code == 2 and "reward model" in answer.output
    report = (tmp_path / "runs/job/report.html").read_text()
    assert "eval_accuracy" in report


def _same(measured: dict[str, float], true: dict[str, float]) -> None:
    assert {name: measured[name] for name in true} == pytest.approx(true, abs=CLOSE)


def test_faults(base_job: Job, write_job: Callable[[Job], Path]) -> None:
    base_job["spec"]["stages"] = [stage(lora={"merge": False, "targetModules": ["q_prj"]})]
    result = CliRunner().invoke(app, ["validate", str(write_job(base_job))])
    assert result.exit_code == 2 and "lora.merge must be true" in result.output


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_zero_and_workers(base_job: Job, write_job: Callable[[Job], Path], tmp_path: Path) -> None:
    """ZeRO-1, 2 and 3 on two workers equal one worker for 4-bit adapters, adapters and all weights."""
    lora: Job = {"lora": {"r": 4}}
    variants: dict[str, Job] = {"qlora": {**lora, "quantization": {"bits": 4}}, "lora": lora, "full": {}}

    def stages(workers: int) -> list[Job]:
        batch = {"perDeviceTrainBatchSize": 8 // workers, "weightDecay": 0.1}
        return [{"name": name, **stage(**batch, **one)} for name, one in variants.items()]

    done_by = under_each_zero(base_job, write_job, tmp_path, stages)
    curves = {
        zero: [losses(one) + list(_measured(one)) for one in directories] for zero, directories in done_by.items()
    }
    for zero in (1, 2, 3):
        for one, other in zip(curves[0], curves[zero], strict=True):
            assert other == pytest.approx(one, abs=1e-4), f"ZeRO-{zero}"


def _measured(one: Path) -> tuple[float, float]:
    metrics = done(one)["metrics"]
    return metrics["eval_accuracy"], metrics["eval_margin"]
