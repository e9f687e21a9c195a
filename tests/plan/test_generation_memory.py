"""Plans of reward, rlhf, online and synthesis stages: steps, sequences, second models, and memory of generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.plan.tiny_models import FIELDS, tiny
from transformers import AutoConfig

from finetune_api.runconfig import RunConfig
from finetune_trainer.errors import UserError
from finetune_trainer.plan import PlanContext, plan_job
from finetune_trainer.plan.devices import Device
from finetune_trainer.plan.model_size import meta_model
from finetune_trainer.plan.records import DataSize, StagePlan, TeacherPlan

DATA = {"sources": [{"inline": [{"text": "x"}]}]}
CPU = PlanContext(Device("CPU", 8 << 30, "cpu"), workers=2)
TINY = {"model_type": "qwen3"} | FIELDS["qwen3"]
SIZE = DataSize(20, 200, 10)
REWARD = {"reward": {"data": DATA, "maxLength": 32, "perDeviceTrainBatchSize": 4}}


def _plan(*stages: dict[str, Any], size: DataSize | None = SIZE, zero: int = 0) -> list[StagePlan]:
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "planned"},
        "spec": {"model": {"config": TINY}, "stages": list(stages), "sharding": {"zero": zero}},
    }
    run = RunConfig.model_validate({"job": job, "root": "/tmp/x", "baseDir": "/tmp", "cacheDir": "/tmp/c"})
    return list(plan_job(run, CPU, rows=lambda index: size).stages)


def _rlhf(**fields: Any) -> dict[str, Any]:
    common = {"data": DATA, "rewards": [{"stage": "reward"}], "generation": {"maxNewTokens": 16}}
    return {"rlhf": {**common, "perDeviceTrainBatchSize": 2, "numGenerations": 4, **fields}}


def _online(**fields: Any) -> dict[str, Any]:
    common = {"data": DATA, "judge": {"stage": "reward"}, "generation": {"maxNewTokens": 16}, "rounds": 3}
    return {"online": {**common, "perDeviceTrainBatchSize": 2, "numGenerations": 4, **fields}}


def test_a_reward_model_has_a_score_in_place_of_a_head() -> None:
    (plan,) = _plan(REWARD)
    assert plan.parameters == sum(one.numel() for one in meta_model(tiny("qwen3"), "reward").parameters())
    (adapted,) = _plan({"reward": REWARD["reward"] | {"lora": {"r": 4}}})
    assert adapted.trainable == adapted.parameters - plan.parameters > 32  # the head is trained besides the adapters
    (dpo,) = _plan({"dpo": REWARD["reward"]})
    assert plan.memory.loss < dpo.memory.loss and plan.memory.activations == dpo.memory.activations


def test_rlhf() -> None:
    reward, full, lora = _plan(REWARD, _rlhf(numIterations=2), {"name": "lora", **_rlhf(lora={"r": 4})})
    assert (full.length, full.steps.rows_per_step) == (26, 4)
    assert (full.steps.total, lora.steps.total) == (10, 5)
    assert full.tokens_per_step == 4 * 4 * 26
    assert full.memory.reference > 0 == lora.memory.reference
    assert full.memory.scorers == 4 * reward.parameters
    assert "draws 16 answers of at most 16 tokens for each 2 steps" in full.notes
    assert "draws 16 answers of at most 16 tokens for each step" in lora.notes
    _, alone = _plan(REWARD, _rlhf(beta=0.0))
    assert alone.memory.reference == 0


def test_rounds() -> None:
    _, plan = _plan(REWARD, _online(promptsPerRound=10, numTrainEpochs=2.0, lora={"r": 4}))
    assert (plan.steps.total, plan.steps.per_epoch, plan.memory.reference) == (15, 5, 0)
    assert "draws 4 answers of at most 16 tokens to each prompt in each of 3 rounds" in plan.notes
    _, full = _plan(REWARD, _online(maxSteps=7))
    assert full.steps.total == 9 and full.memory.reference > 0
    _, previous = _plan(REWARD, _online(reference="previous"))
    assert previous.memory.reference == 0
    assert _plan(REWARD, _online(), size=None)[1].steps.total is None


def test_drawing_counts_where_it_needs_more_than_training() -> None:
    """A large KV cache of many answers exceeds a short training pass; ZeRO-3 gathers the model in addition."""
    few, many = (_plan(REWARD, _online(numGenerations=count))[1] for count in (2, 512))
    assert few.memory.drawing == 0 < many.memory.drawing
    divided = _plan(REWARD, _online(numGenerations=512), zero=3)[1]
    assert divided.memory.drawing - many.memory.drawing >= 4 * many.parameters * 0.9


def _teacher(memory: int = 8 << 30, **model: Any) -> TeacherPlan:
    questions = {"questions": {"numQuestions": 1}, "data": DATA}
    teacher = {"model": {"perDeviceBatchSize": 4, **model}, "generation": {"maxNewTokens": 16}}
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "planned"},
        "spec": {"model": {"config": TINY}, "stages": [REWARD, {"synthesize": {**questions, "teacher": teacher}}]},
    }
    run = RunConfig.model_validate({"job": job, "root": "/tmp/x", "baseDir": "/tmp", "cacheDir": "/tmp/c"})
    plan = plan_job(run, PlanContext(Device("CPU", memory, "cpu")))
    (found,) = plan.teachers
    assert plan.fits == found.fits
    return found


def test_a_teacher_on_the_job_s_own_workers(tmp_path: Path) -> None:
    """A local teacher needs its weights and a KV cache; it is the job's model or another one."""
    own = _teacher()
    model = meta_model(tiny("qwen3"))
    assert own.parameters == sum(one.numel() for one in model.parameters())
    assert own.memory.weights == 4 * own.parameters and own.length == 64 and own.fits and not own.advice
    assert 2 * _teacher(perDeviceBatchSize=2).memory.buffers == own.memory.buffers > 0
    AutoConfig.for_model(**TINY | {"vocab_size": 500}).save_pretrained(tmp_path)
    assert _teacher(path=str(tmp_path)).parameters > own.parameters
    room = own.memory.total - own.memory.buffers
    assert (
        "teacher.model.perDeviceBatchSize: 2 takes" in _teacher(round(room / 0.9) + own.memory.buffers // 2).advice[0]
    )
    assert "use a smaller one" in _teacher(1 << 20).advice[0]


def test_a_teacher_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"teacher\.model\.path"):
        _teacher(path="/nowhere/at/all")
