"""Online DPO with a judge whose optimum is known: the share of even token ids, at most 1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs.in_process import open_stage, resumed, trained
from support.jobs.running import curve, done, losses, run, under_each_zero

from finetune_trainer.errors import UserError

Job = dict[str, Any]
JUDGE = '''
def even(prompts, completions, completion_ids, **_):
    """The share of an answer's tokens whose id is even."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

def alike(prompts, completions, **_):
    return [1.0] * len(completions)
'''
TOLERANCE = 1e-4
"""Tolerance for losses on two workers, which add gradients in another order."""


LORA: Job = {"lora": {"r": 8, "modulesToSave": ["embed_tokens"]}}
"""With the random embeddings frozen, an adapter elsewhere could hardly change the probabilities."""
FULL: Job = {"learningRate": 3e-3}


def stage(**fields: Any) -> dict[str, Any]:
    def prompts(first: int, last: int) -> dict[str, Any]:
        turns = [{"role": "user", "content": "1 plus 1"}, {"role": "assistant", "content": "makes 2"}]
        rows = [{"messages": [*turns, {"role": "user", "content": f"{a} plus {a}"}]} for a in range(first, last)]
        return {"sources": [{"inline": rows}]}

    common = {
        "data": prompts(0, 12),
        "evalData": prompts(12, 24),
        "judge": {"function": "toy_judge:even"},
        "generation": {"maxNewTokens": 8},
        "rounds": 3,
        "numGenerations": 8,
        "numTrainEpochs": 4.0,
        "perDeviceTrainBatchSize": 2,
        "gradientAccumulationSteps": 2,
        "learningRate": 1e-2,
        "warmupSteps": 0,
        "lrSchedulerType": "constant",
    }
    return {"online": {**common, **fields}}


@pytest.fixture
def job(base_job: Job, tmp_path: Path) -> Job:
    (tmp_path / "toy_judge.py").write_text(JUDGE)
    return base_job


@pytest.mark.parametrize(("reference", "fields"), [("start", LORA), ("previous", LORA), ("start", FULL)])
def test_rounds_win(reference: str, fields: Job, job: Job, tmp_path: Path) -> None:
    """The reward rises in each round, the last model wins against the first, and two runs are equal."""
    job["spec"]["stages"] = [stage(reference=reference, **fields)]
    found = []
    for name in ("one", "two"):
        job["metadata"]["name"] = name
        with trained(open_stage(job, tmp_path), evaluate=True) as trainer:
            found.append(_curve(trainer))
        directory = tmp_path / f"runs/{name}/stages/00-online"
        rounds = json.loads((directory / "rounds.json").read_text())["rounds"]
    assert found[0] == found[1] and len(found[0]) == 3 * 12
    print(rounds)
    assert [one["round"] for one in rounds] == [0, 1, 2]
    assert all(one["pairs"] + one["ties"] == one["prompts"] == 12 for one in rounds)
    assert rounds[2]["reward"] > rounds[0]["reward"] + 0.1
    assert rounds[2]["win_rate"] > 0.8
    pairs = [json.loads(line) for line in (directory / "rounds/000/pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == rounds[0]["pairs"]
    assert {"prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps"} <= pairs[0].keys()


def test_a_judge_that_sees_no_difference(job: Job, tmp_path: Path) -> None:
    job["spec"]["stages"] = [stage(judge={"function": "toy_judge:alike"})]
    alike = pytest.raises(UserError, match="judge: ranks all answers to the 12 prompts of round 1 alike")
    with alike, trained(open_stage(job, tmp_path)):
        pass


def test_resumes(job: Job, tmp_path: Path) -> None:
    """Resuming inside a round, or at its start with some answers generated, gives the same curve."""
    job["spec"]["stages"] = [stage(rounds=2, numTrainEpochs=1.0, saveSteps=4, **LORA)]
    context = open_stage(job, tmp_path)
    directory = tmp_path / "runs/job/stages/00-online"
    with trained(context) as trainer:
        undisturbed = _curve(trainer)
    assert len(undisturbed) == 6
    samples = (directory / "rounds/001/samples.jsonl").read_text()
    with resumed(context, 4) as trainer:
        assert _curve(trainer) == undisturbed
    for name in ("samples.jsonl", "pairs.jsonl"):
        (directory / "rounds/001" / name).unlink()
    (directory / "rounds/001/samples-000002.jsonl").write_text("".join(samples.splitlines(keepends=True)[4:6]))
    with resumed(context, 3) as trainer:
        assert _curve(trainer) == undisturbed
    assert (directory / "rounds/001/samples.jsonl").read_text() == samples


def _curve(trainer: Any) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_resumes_and_workers_change_nothing(job: Job, write_job: Callable[[Job], Path], tmp_path: Path) -> None:
    """On two workers, a run that is killed while it generates a round's answers reuses those that exist."""
    fields: Job = LORA | {"rounds": 2, "saveTotalLimit": 9, "numTrainEpochs": 2.0}
    fields |= {"perDeviceTrainBatchSize": 1, "learningRate": 5e-3}
    job["spec"]["stages"] = [stage(**fields)]
    job["spec"]["resources"] = {"workersPerNode": 2}
    path = write_job(job)
    code, output = run(path)
    assert code == 0, output
    directory = tmp_path / "runs/job/stages/00-online"
    undisturbed, facts = curve(directory), json.loads((directory / "rounds.json").read_text())
    assert len(undisturbed) == 12 and done(directory)["metrics"]["eval_win_rate"] > 0.5
    samples = (directory / "rounds/001/samples.jsonl").read_text().splitlines(keepends=True)
    _die_while_drawing(directory, samples)
    code, output = run(path, "--resume")
    assert code == 0 and "resumes at step 6" in output, output
    assert curve(directory) == undisturbed
    assert json.loads((directory / "rounds.json").read_text()) == facts
    assert (directory / "rounds/001/samples.jsonl").read_text().splitlines(keepends=True) == samples
    assert "part 2 of 2" in output.partition("resumes at step 6")[2]
    job["metadata"]["name"] = "alone"
    job["spec"]["stages"] = [stage(**fields | {"perDeviceTrainBatchSize": 2})]
    with trained(open_stage(job, tmp_path)) as trainer:
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses == pytest.approx([loss for _, loss, _, _ in undisturbed], abs=TOLERANCE)
    assert "win rate" in (tmp_path / "runs/job/report.html").read_text()


def _die_while_drawing(directory: Path, samples: list[str]) -> None:
    """Leave the files of a run that is killed in its second round with ten of twelve prompts answered."""
    for name in ("result", "checkpoints/checkpoint-12"):
        shutil.rmtree(directory / name)
    (directory / "done.json").unlink()
    for name in ("samples.jsonl", "pairs.jsonl"):
        (directory / "rounds/001" / name).unlink()
    for part in range(10):
        (directory / f"rounds/001/samples-{part:06d}.jsonl").write_text(samples[part])
    table = json.loads((directory / "rounds.json").read_text())
    table["rounds"] = table["rounds"][:1]
    (directory / "rounds.json").write_text(json.dumps(table))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_zero(job: Job, write_job: Callable[[Job], Path], tmp_path: Path) -> None:
    """ZeRO-1, 2 and 3 on two workers generate, rank and learn like one worker, with adapters and with all weights.

    Each variant starts from the one before it: steps are small, so that no difference in rounding grows until another
    answer is generated.
    """
    lora: Job = {"lora": {"r": 8}}
    variants: dict[str, Job] = {"qlora": {**lora, "quantization": {"bits": 4}}, "lora": lora, "full": {}}

    def stages(workers: int) -> list[Job]:
        small = {"perDeviceTrainBatchSize": 2 // workers, "rounds": 2, "numTrainEpochs": 1.0, "learningRate": 1e-3}
        return [{"name": name, **stage(**small, **one)} for name, one in variants.items()]

    done_by = under_each_zero(job, write_job, tmp_path, stages)
    curves = {zero: [losses(one) for one in directories] for zero, directories in done_by.items()}
    assert all(len(one) == 2 * 3 for one in curves[0])
    for zero in (1, 2, 3):
        for one, other in zip(curves[0], curves[zero], strict=True):
            assert other == pytest.approx(one, abs=TOLERANCE), f"ZeRO-{zero}"
