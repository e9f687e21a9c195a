from __future__ import annotations

import json
from typing import Any

import pytest
from support.plan.planned_jobs import DATA, LLAMA_8B, run, text_of
from support.plan.tiny_models import FIELDS

from finetune_trainer.errors import UserError
from finetune_trainer.plan import PlanContext, plan_job
from finetune_trainer.plan.devices import Device, known_device
from finetune_trainer.plan.records import DataSize

A100 = PlanContext(known_device("A100-80GB") or Device("", 0, ""), workers=8)
CPU = PlanContext(Device("CPU", 8 << 30, "cpu"))


def test_pipeline() -> None:
    tiny = {"model_type": "qwen3"} | {key: value for key, value in FIELDS["qwen3"].items() if key != "vocab_size"}
    stages = (
        {"tokenizer": {"data": DATA, "vocabSize": 300}},
        {"pretrain": {"data": DATA, "blockSize": 32, "perDeviceTrainBatchSize": 4}},
        {"sft": {"data": DATA, "maxLength": 48, "lora": {"r": 4}, "perDeviceTrainBatchSize": 4}},
        {"dpo": {"data": DATA, "perDeviceTrainBatchSize": 4}},
    )
    sizes = {1: (100, 3200), 2: DataSize(10, 200, longest=30), 3: None}
    plan = plan_job(run(*stages, model=tiny), CPU, rows=sizes.get)
    pretrain, sft, dpo = plan.stages
    assert [stage.index for stage in plan.stages] == [1, 2, 3]
    assert plan.dtype == "float32" and plan.fits
    assert (pretrain.steps.total, pretrain.tokens_per_step) == (25, 128)
    assert pretrain.parameters == pretrain.trainable == dpo.parameters
    assert (sft.steps.total, sft.tokens_per_step, sft.length) == (3, 80, 30)
    assert sft.trainable == sft.parameters - pretrain.parameters
    assert (dpo.steps.total, dpo.length) == (None, 64)
    assert dpo.memory.reference == dpo.memory.weights > 0 == sft.memory.reference
    assert any("context, 64 tokens" in note for note in dpo.notes)
    assert json.loads(json.dumps(plan.to_json()))["stages"][0]["memory"]["total"] == pretrain.memory.total


def test_text_says_what_is_needed_and_what_to_change() -> None:
    stage = {"sft": {"data": DATA, "maxLength": 2048}}
    text = text_of(plan_job(run(stage), A100))
    assert "8.03 B trained (100.000%)" in text
    assert "does not fit NVIDIA A100-80GB (80 GiB, 10% kept free)" in text
    assert "→ set stages[0].sft.gradientCheckpointing to true" in text
    assert "? rows, ? tokens, up to 2048 per row" in text
    assert "not known before the data is read" in text


@pytest.mark.parametrize(
    ("values", "context", "expected"),
    [
        ({"maxLength": 2048, "gradientCheckpointing": True, "perDeviceTrainBatchSize": 128, "lora": {}}, A100,
         "perDeviceTrainBatchSize to 64 and gradientAccumulationSteps to 2"),
        ({"maxLength": 512, "gradientCheckpointing": True, "perDeviceTrainBatchSize": 1},
         PlanContext(A100.device, workers=1), "stages[0].sft.lora to {}"),
        ({"maxLength": 512, "gradientCheckpointing": True, "perDeviceTrainBatchSize": 1, "lora": {}},
         PlanContext(known_device("L4") or CPU.device), None),
        ({"maxLength": 512, "gradientCheckpointing": True, "perDeviceTrainBatchSize": 1, "lora": {}},
         PlanContext(known_device("T4") or CPU.device), "stages[0].sft.quantization to {bits: 4}"),
    ],
)  # fmt: skip
def test_advice_in_its_order(values: dict[str, Any], context: PlanContext, expected: str | None) -> None:
    [stage] = plan_job(run({"sft": {"data": DATA} | values}, model=LLAMA_8B | {"dtype": "bfloat16"}), context).stages
    assert stage.fits == (expected is None), stage.memory
    assert expected is None or expected in stage.advice[0]


def test_advice_that_takes_several_changes_or_fails() -> None:
    stage = {"sft": {"data": DATA, "maxLength": 1024}}
    one = PlanContext(Device("NVIDIA L4", 22 << 30, "cuda"))
    advice = plan_job(run(stage), one).stages[0].advice
    assert advice[1].startswith("and ") and "fits" in advice[-1]
    small = PlanContext(Device("NVIDIA L4", 4 << 30, "cuda"))
    assert "that is not enough" in plan_job(run(stage), small).stages[0].advice[-1]


def test_all_faults_of_all_stages_at_once() -> None:
    bad = {"lora": {"targetModules": ["q_poj"]}, "quantization": {"bits": 8}, "maxLength": 64}
    job = run({"sft": {"data": DATA} | bad}, {"dpo": {"data": DATA} | bad}, sharding={"zero": 3})
    with pytest.raises(UserError) as caught:
        plan_job(job, A100)
    assert [problem.path for problem in caught.value.problems] == [
        "sharding.zero", "stages[0].sft.lora.targetModules", "stages[1].dpo.lora.targetModules"
    ]  # fmt: skip
    assert "did you mean `q_proj`?" in caught.value.problems[1].message
