"""Equivalent jobs give equal losses at each step.

All of it is float32, where a sum in another order differs by about 1e-7 of its size. Over 20 steps of AdamW, which
divides by the root of small squares, that grows to a few 1e-6: TOLERANCE is what the project promises, CLOSE what one
process reaches. A wrong gradient scale, another order of rows, a mean of means in place of a mean over tokens (the rows
are of uneven length) or attention across documents show as 1e-2 and more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import in_process
from support.jobs.running import done, losses, run
from support.jobs.tiny_rows import dialogue

Job = dict[str, Any]
WriteJob = Callable[[Job], Path]
TOLERANCE, CLOSE = 1e-4, 2e-5
STEPS = 20


@pytest.fixture
def job(base_job: Job, tmp_path: Path) -> Job:
    """Return a job with 16 dialogues or pairs of uneven length, which two workers can divide evenly."""
    rows = [dialogue(f"count to {n}", " ".join(map(str, range(n % 7 + 1)))) for n in range(16)]
    pairs = [
        {"prompt": f"{n} plus 1", "chosen": " makes " * (n % 3 + 1) + str(n), "rejected": f" says {n + 3}"}
        for n in range(16)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return base_job


def sft(**fields: Any) -> dict[str, Any]:
    return {"sft": _fields("rows.jsonl", fields)}


def dpo(**fields: Any) -> dict[str, Any]:
    return {"dpo": _fields("pairs.jsonl", fields)}


def pretrain(**fields: Any) -> dict[str, Any]:
    rows = [{"text": f"{n} plus {n} makes {n + n}. " * 3} for n in range(16)]
    common = _fields("", {"data": {"sources": [{"inline": rows}]}, **fields})
    del common["maxLength"]
    return {"pretrain": {"blockSize": 16, **common}}


def _fields(file: str, fields: dict[str, Any]) -> dict[str, Any]:
    common = {"maxLength": 64, "maxSteps": STEPS, "learningRate": 1e-3, "weightDecay": 0.1}
    return {"data": {"sources": [{"file": file}]}, "perDeviceTrainBatchSize": 4, **common, **fields}


@pytest.fixture
def curve(job: Job, tmp_path: Path) -> Callable[[dict[str, Any]], list[float]]:
    """Train a stage in this process and return the loss of each step, which must fall."""

    def train(stage: dict[str, Any]) -> list[float]:
        job["spec"]["stages"] = [stage]
        found = in_process.losses(job, tmp_path)
        assert len(found) == STEPS and found[-1] < found[0] - 0.01
        return found

    return train


Curve = Callable[[dict[str, Any]], list[float]]


@pytest.mark.parametrize("stage", [sft, dpo, pretrain])
def test_accumulation(stage: Callable[..., dict[str, Any]], curve: Curve) -> None:
    """A batch of four rows equals four accumulated batches of one row."""
    at_once = curve(stage(perDeviceTrainBatchSize=4))
    accumulated = curve(stage(perDeviceTrainBatchSize=1, gradientAccumulationSteps=4))
    assert accumulated == pytest.approx(at_once, abs=CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing(attention: str, job: Job, curve: Curve) -> None:
    """All dialogues in one batch with a row each equal the same dialogues packed into fewer rows."""
    job["spec"]["model"]["attnImplementation"] = attention
    unpacked = curve(sft(perDeviceTrainBatchSize=16))
    packed = curve(sft(perDeviceTrainBatchSize=16, packing=True))
    assert packed == pytest.approx(unpacked, abs=CLOSE)


@pytest.mark.parametrize(("lora", "live"), [(None, "model"), ({"r": 4}, "model"), ({"r": 4}, "adapterDisabled")])
def test_precomputed_reference(lora: dict[str, Any] | None, live: str, curve: Curve) -> None:
    """Log-probabilities precomputed before training equal those of a reference model during training."""
    fields = {"lora": lora} if lora else {}
    precomputed, beside = (curve(dpo(reference=reference, **fields)) for reference in ("precomputed", live))
    assert beside[0] == pytest.approx(0.6931, abs=1e-3)  # ln 2: the policy still equals the reference
    assert precomputed == pytest.approx(beside, abs=CLOSE)


@pytest.mark.parametrize("bits", [4, 8])
def test_evaluation_changes_nothing(bits: int, job: Job, tmp_path: Path) -> None:
    """Training on quantized weights after an evaluation equals training without one, gradients included.

    On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights for evaluation into a form without a backward pass;
    elsewhere this always holds.
    """
    stage = sft(lora={"r": 4}, quantization={"bits": bits}, evalData={"sources": [{"file": "rows.jsonl"}]}, maxSteps=3)
    job["spec"]["stages"] = [stage]
    plain, evaluated = (_gradients(job, tmp_path, evaluate) for evaluate in (False, True))
    assert len(plain) == 3 and evaluated == plain


def _gradients(job: Job, tmp_path: Path, evaluate: bool) -> list[tuple[float, float]]:
    with in_process.trained(in_process.open_stage(job, tmp_path), evaluate) as trainer:
        return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "grad_norm" in row]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_zero_and_workers(job: Job, write_job: WriteJob, tmp_path: Path) -> None:
    """Whole jobs with ZeRO-1, 2 and 3 on two workers give the losses of one worker.

    This holds for adapters on 4-bit weights, for full fine-tuning and for adapters, and for DPO with the reference
    computed ahead on two workers and during training on one.
    """
    one = _job_curves(job, write_job, tmp_path, "one", batch=4, reference="model")
    assert all(curve[-1] < curve[0] - 0.01 for curve in one)
    job["spec"]["resources"] = {"workersPerNode": 2}
    for zero in (1, 2, 3):
        job["spec"]["sharding"] = {"zero": zero}
        two = _job_curves(job, write_job, tmp_path, f"zero{zero}", batch=2, reference="precomputed")
        for index, curve in enumerate(two):
            assert curve == pytest.approx(one[index], abs=TOLERANCE), f"ZeRO-{zero}, stage {index}"


def _job_curves(
    job: Job, write_job: WriteJob, tmp_path: Path, name: str, batch: int, reference: str
) -> list[list[float]]:
    fields = {"perDeviceTrainBatchSize": batch}
    # The quantized stage comes first because its initial weights must be equal to the last bit: a weight that
    # differs by 1e-7 may round to another of the 16 values of 4 bits.
    qlora = sft(**fields, lora={"r": 4}, quantization={"bits": 4})
    stages = {"qlora": qlora, "full": sft(**fields), "lora": sft(**fields, lora={"r": 4})}
    stages["dpo"] = dpo(**fields, lora={"r": 4}, reference=reference)
    job["metadata"]["name"] = name
    job["spec"]["stages"] = [{"name": title, **stage} for title, stage in stages.items()]
    code, output = run(write_job(job))
    assert code == 0, output
    directories = sorted((tmp_path / "runs" / name / "stages").iterdir())
    zero, workers = job["spec"].get("sharding", {}).get("zero", 0), 4 // batch
    assert {(done(one)["zero"], done(one)["world_size"]) for one in directories} == {(zero, workers)}
    return [losses(one) for one in directories]
