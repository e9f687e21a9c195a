"""A finished stage frees its models, master weights and optimizer states under every ZeRO stage."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

Job = dict[str, Any]


def test_a_finished_stage_leaves_nothing_behind(base_job: Job, tmp_path: Path) -> None:
    """Without `release` every stage under ZeRO would stay in memory until the worker ends.

    DeepSpeed's gradient hooks refer to the optimizer from C++, where the garbage collector does not see them
    (DeepSpeed#4856).
    """
    full, adapter, pairs, accumulating = _jobs(base_job)
    trained = [(job, zero) for job in (full, adapter) for zero in (0, 1, 2, 3)]
    stages = [*trained, (pairs, 0), (pairs, 3), (accumulating, 2), (accumulating, 3)]
    found = _run(stages, tmp_path)
    assert all(count > 3 for count, _, _ in found), found
    left = {(number, zero): names for number, ((_, zero), (_, names, _)) in enumerate(zip(stages, found, strict=True))}
    assert {place: names for place, names in left.items() if names} == {}


def test_the_memory_of_a_job_of_five_stages_is_flat(base_job: Job, tmp_path: Path) -> None:
    """Without `release`, each of these stages under ZeRO-2 would add its master weights and optimizer states."""
    held = [size for _, _, size in _run([(base_job, 2)] * 5, tmp_path)]
    assert max(held) - min(held) <= 0.01 * max(held) + 4096, held


def _run(stages: list[tuple[Job, int]], directory: Path) -> list[list[Any]]:
    """Return for each stage its number of parts, the parts that are still alive, and the bytes of all tensors."""
    (directory / "stages.json").write_text(json.dumps(stages))
    script = Path(__file__).with_name("finished_stages.py")
    done = subprocess.run(
        [sys.executable, str(script), str(directory), str(directory / "stages.json")],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "DS_ACCELERATOR": "cpu"},
    )
    lines = [line.removeprefix("ALIVE ") for line in done.stdout.splitlines() if line.startswith("ALIVE ")]
    assert len(lines) == len(stages), done.stderr[-3000:]
    return [json.loads(line) for line in lines]


def _jobs(base: Job) -> tuple[Job, Job, Job, Job]:
    """Return jobs: full fine-tuning, an adapter, DPO with a reference model, and accumulated bfloat16 gradients."""
    full, adapter, pairs, accumulating = (copy.deepcopy(base) for _ in range(4))
    adapter["spec"]["stages"][0]["sft"]["lora"] = {"r": 4}
    data = {"sources": [{"file": "pairs.jsonl"}]}
    pairs["spec"]["stages"] = [{"dpo": {"data": data, "maxLength": 64, "maxSteps": 2}}]
    accumulating["metadata"]["name"] = "accumulate"
    accumulating["spec"]["model"]["dtype"] = "bfloat16"
    accumulating["spec"]["stages"][0]["sft"] |= {"perDeviceTrainBatchSize": 2, "gradientAccumulationSteps": 2}
    return full, adapter, pairs, accumulating
