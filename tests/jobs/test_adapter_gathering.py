"""Saving an adapter under ZeRO-3 gathers the trained weights only, not the base's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Job = dict[str, Any]
WORKERS = 2


def test_only_trained_weights_are_put_together(base_job: Job, tmp_path: Path) -> None:
    """Gathering all weights of a 70B model would move 140 GB through every GPU onto the first host."""
    base_job["spec"]["stages"][0]["sft"]["lora"] = {"r": 4, "merge": False}
    (tmp_path / "job.json").write_text(json.dumps(base_job))
    for found in _run(tmp_path):
        assert 0 < found["trained"] < found["all"] / 4
        assert found["gathered"] == found["trained"]
    saved = load_file(tmp_path / "result" / "adapter_model.safetensors")
    assert len(saved) == 28 and all(torch.isfinite(one).all() and one.numel() for one in saved.values())
    assert all(one.abs().max() > 0 for name, one in saved.items() if "lora_B" in name)
    assert sum(one.nbytes for one in saved.values()) == found["trained"]


def _run(directory: Path) -> list[dict[str, int]]:
    script = str(Path(__file__).with_name("adapter_gathering.py"))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    commands = [
        [sys.executable, script, str(directory), str(directory / "job.json"), str(rank), str(WORKERS)]
        for rank in range(WORKERS)
    ]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        for command in commands
    ]
    outputs = [worker.communicate(timeout=280) for worker in workers]
    lines = [line for output, _ in outputs for line in output.splitlines() if line.startswith("BYTES ")]
    assert len(lines) == WORKERS, outputs[0][1][-3000:]
    return [json.loads(line.removeprefix("BYTES ")) for line in lines]
