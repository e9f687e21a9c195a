"""Reinforcement learning with a reward whose optimum is known: the share of even token ids, at most 1."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs.in_process import open_stage, resumed, trained
from support.jobs.running import done, run, under_each_zero

from finetune_trainer.progress.metrics_log import read_metrics

Job = dict[str, Any]
REWARDS = '''
def even(prompts, completions, completion_ids, **_):
    """The share of an answer's tokens whose id is even."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
'''
LORA: Job = {"lora": {"r": 8, "modulesToSave": ["embed_tokens"]}}
"""With the random embeddings frozen, an adapter elsewhere could hardly change the probabilities."""
TOLERANCE = 1e-4
"""Tolerance for losses and KL on two workers, which add gradients in another order."""


def stage(**fields: Any) -> dict[str, Any]:
    prompts = [{"messages": [{"role": "user", "content": f"{a} plus {a}"}], "answer": f"{a + a}"} for a in range(6)]
    common = {
        "data": {"sources": [{"inline": prompts}]},
        "rewards": [{"function": "toy_rewards:even"}],
        "generation": {"maxNewTokens": 8},
        "numGenerations": 8,
        "maxSteps": 20,
        "perDeviceTrainBatchSize": 2,
        "gradientAccumulationSteps": 2,
        "learningRate": 1e-2,
        "warmupSteps": 0,
        "lrSchedulerType": "constant",
        "beta": 0.01,
    }
    return {"rlhf": {**common, **fields}}


@pytest.fixture
def job(base_job: Job, tmp_path: Path) -> Job:
    (tmp_path / "toy_rewards.py").write_text(REWARDS)
    return base_job


def curve(trainer: Any) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(("algorithm", "fields"), [("rloo", {}), ("rloo", LORA), ("grpo", LORA)])
def test_the_reward_rises(algorithm: str, fields: Job, job: Job, tmp_path: Path) -> None:
    """The reward rises, and two runs are equal to the last bit."""
    job["spec"]["stages"] = [stage(algorithm=algorithm, **fields)]
    curves = []
    for _ in range(2):
        with trained(open_stage(job, tmp_path)) as trainer:
            curves.append([(row["loss"], row["reward"], row["kl"], row["grad_norm"]) for row in curve(trainer)])
    rewards = [reward for _, reward, _, _ in curves[0]]
    print([round(one, 3) for one in rewards], [round(kl, 2) for *_, kl, _ in curves[0]])
    assert sum(rewards[:2]) / 2 < 0.6 and sum(rewards[-3:]) / 3 > 0.7
    assert abs(curves[0][0][2]) < 1e-4 and curves[0][-1][2] > 0.5
    assert curves[0] == curves[1]


def test_the_bound_holds(job: Job, tmp_path: Path) -> None:
    """The stage ends with the weights of the last step within the KL bound, and reports where it was exceeded."""
    job["spec"]["stages"] = [stage(maxKl=1.0, maxSteps=40, **LORA)]
    with trained(open_stage(job, tmp_path)) as trainer:
        kls = [row["kl"] for row in curve(trainer)]
        assert 2 < len(kls) < 40 and max(kls[:-1]) <= 1.0 < kls[-1]
        assert trainer.final_metrics() == {"kl_passed_at_step": len(kls), "kl_passed": pytest.approx(kls[-1], rel=1e-3)}
        assert not trainer.stage.keeps_last
        ended = _weights(trainer)
    # The model that step n measures is the one after n - 1 updates.
    job["spec"]["stages"] = [stage(maxSteps=len(kls) - 2, **LORA)]
    with trained(open_stage(job, tmp_path)) as trainer:
        for name, weight in _weights(trainer).items():
            assert torch.equal(weight, ended[name]), name


def _weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in trainer.model.named_parameters() if one.requires_grad}


def test_right_answers_patterns_and_held_out_prompts(job: Job, tmp_path: Path) -> None:
    """Rewards are logged separately and as their weighted sum, on held-out prompts too."""
    rewards = [{"exactMatch": "answer", "weight": 2.0}, {"regex": "[aeiou]"}, {"function": "toy_rewards:even"}]
    held_out = {"sources": [{"inline": [{"prompt": f"{a} plus 1", "answer": "x"} for a in range(3)]}]}
    prompts = {"sources": [{"inline": [{"prompt": f"{a} plus 2", "answer": f"{a + 2}"} for a in range(4)]}]}
    fields = {"data": prompts, "evalData": held_out, "maxSteps": 2, "beta": 0.0}
    job["spec"]["stages"] = [stage(rewards=rewards, **fields)]
    with trained(open_stage(job, tmp_path), evaluate=True) as trainer:
        row, measured = curve(trainer)[-1], trainer.evaluate()
    names = ("exact_match", "regex", "even")
    parts = [row[f"rewards/{name}/mean"] for name in names]
    assert row["reward"] == pytest.approx(2 * parts[0] + parts[1] + parts[2], abs=1e-3)
    held = [measured[f"eval_rewards/{name}"] for name in names]
    assert measured["eval_reward"] == pytest.approx(2 * held[0] + held[1] + held[2], abs=1e-5)
    assert held[0] == 0 and 0 < held[2] < 1 and "kl" not in row


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_resumes(algorithm: str, job: Job, tmp_path: Path) -> None:
    """A checkpoint between two updates on one batch of answers resumes to the last bit, including the KL bound."""
    fields = {"algorithm": algorithm, "numIterations": 2, "maxSteps": 12, "saveSteps": 5, "learningRate": 3e-3}
    job["spec"]["stages"] = [stage(**fields, maxKl=0.6)]
    context = open_stage(job, tmp_path)
    with trained(context) as trainer:
        undisturbed, ended = curve(trainer), _weights(trainer)
    assert len(undisturbed) > 5
    with resumed(context, 5) as trainer:
        assert curve(trainer) == undisturbed
        assert all(torch.equal(weight, ended[name]) for name, weight in _weights(trainer).items())


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_resumes_and_workers_change_nothing(job: Job, write_job: Callable[[Job], Path], tmp_path: Path) -> None:
    """A run that is killed between two updates on one batch resumes to the same curve, which one worker gives too."""
    fields = {"lora": {"r": 8}, "numIterations": 2, "maxSteps": 8, "saveSteps": 3, "saveTotalLimit": 9}
    job["spec"]["stages"] = [stage(**fields, maxKl=50.0, perDeviceTrainBatchSize=1)]
    job["spec"]["resources"] = {"workersPerNode": 2}
    path = write_job(job)
    code, output = run(path)
    assert code == 0, output
    directory = tmp_path / "runs/job/stages/00-rlhf"
    undisturbed = _curve(directory)
    assert len(undisturbed) == 8 and done(directory)["world_size"] == 2
    for name in ("result", "checkpoints/checkpoint-6", "checkpoints/checkpoint-8"):
        shutil.rmtree(directory / name)
    (directory / "done.json").unlink()
    code, output = run(path, "--resume")
    assert code == 0 and "resumes at step 3" in output, output
    assert _curve(directory) == undisturbed
    job["spec"]["stages"] = [stage(**fields)]
    with trained(open_stage(job, tmp_path)) as trainer:
        alone = [_values(row, row["loss"]) for row in curve(trainer)]
    for one, two in zip(alone, undisturbed, strict=True):
        assert one == pytest.approx(two, abs=TOLERANCE)


def _curve(directory: Path) -> list[list[float]]:
    rows = read_metrics((directory / "metrics.jsonl").read_text())
    return [_values(row["metrics"], row["loss"]) for row in rows if "loss" in row]


def _values(metrics: dict[str, float], loss: float) -> list[float]:
    """Return the loss, reward and KL of a step, the last two -1 if it generated no answers."""
    return [loss, metrics.get("reward", -1.0), metrics.get("kl", -1.0)]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_zero(algorithm: str, job: Job, write_job: Callable[[Job], Path], tmp_path: Path) -> None:
    """ZeRO-1, 2 and 3 on two workers generate and learn like one worker, with adapters and with all weights.

    Each variant starts from the one before it: steps are small, so that no difference in rounding grows until another
    answer is generated.
    """
    lora: Job = {"lora": {"r": 8}}
    variants: dict[str, Job] = {"qlora": {**lora, "quantization": {"bits": 4}}, "lora": lora}
    variants["full"] = {"learningRate": 1e-4}

    def stages(workers: int) -> list[Job]:
        small = {"perDeviceTrainBatchSize": 2 // workers, "algorithm": algorithm, "maxSteps": 6, "learningRate": 1e-3}
        return [{"name": name, **stage(**small | one)} for name, one in variants.items()]

    done_by = under_each_zero(job, write_job, tmp_path, stages)
    curves = {zero: [_curve(one) for one in directories] for zero, directories in done_by.items()}
    for zero in (1, 2, 3):
        for one, other in zip(curves[0], curves[zero], strict=True):
            for step, row in enumerate(one):
                assert other[step] == pytest.approx(row, abs=TOLERANCE), f"ZeRO-{zero}, step {step}"
