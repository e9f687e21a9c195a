"""Equivalent jobs give equal losses: sharding, workers, where the reference comes from.

The tolerance of 1e-4 per step is room for sums in another order (float32, 20 steps); a wrong gradient scale or a
different row order shows as 1e-2 and more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import done, losses, run

Job = dict[str, Any]
TOLERANCE = 1e-4


def _stages(job: Job, *stages: dict[str, Any]) -> None:
    job["spec"]["stages"] = list(stages)


def _sft(name: str, **fields: Any) -> dict[str, Any]:
    base = {
        "data": {"sources": [{"file": "rows.jsonl"}]},
        "maxLength": 64,
        "maxSteps": 20,
        "learningRate": 1e-3,
        "weightDecay": 0.1,
        "perDeviceTrainBatchSize": 4,
    }
    return {"name": name, "sft": base | fields}


def _run(job: Job, write_job: Callable[[Job], Path], tmp_path: Path, name: str) -> Path:
    job["metadata"]["name"] = name
    code, output = run(write_job(job))
    assert code == 0, output
    return tmp_path / "runs" / name / "stages"


@pytest.mark.timeout(900)
def test_zero_and_workers(base_job: Job, write_job: Callable[[Job], Path], tmp_path: Path) -> None:
    _stages(base_job, _sft("one"))
    one = losses(_run(base_job, write_job, tmp_path, "one") / "00-one")
    assert one[-1] < one[0] - 0.5
    _stages(base_job, _sft("two", perDeviceTrainBatchSize=2))
    base_job["spec"]["resources"] = {"workersPerNode": 2}
    for zero in (1, 2, 3):
        base_job["spec"]["sharding"] = {"zero": zero}
        stage = _run(base_job, write_job, tmp_path, f"zero{zero}") / "00-two"
        assert done(stage)["zero"] == zero and done(stage)["world_size"] == 2
        assert losses(stage) == pytest.approx(one, abs=TOLERANCE)


def test_precomputed_reference(base_job: Job, write_job: Callable[[Job], Path], tmp_path: Path) -> None:
    found = {}
    for reference in ("model", "precomputed"):
        fields = {"data": {"sources": [{"file": "pairs.jsonl"}]}, "maxLength": 64, "maxSteps": 10}
        _stages(base_job, {"dpo": {**fields, "learningRate": 1e-3, "reference": reference}})
        found[reference] = losses(_run(base_job, write_job, tmp_path, reference) / "00-dpo")
    assert found["model"][0] == pytest.approx(0.6931, abs=1e-3)
    assert found["precomputed"] == pytest.approx(found["model"], abs=TOLERANCE)
    assert found["model"][-1] < 0.65
