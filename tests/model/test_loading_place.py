"""Weights are loaded directly onto the worker's device, and on a CPU not twice."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.jobs.in_process import open_stage
from support.model.saved_models import make_model, save

from finetune_trainer.model.load import load_whole
from finetune_trainer.training.adapter_model import starting_model
from finetune_trainer.training.context import Placement
from finetune_trainer.training.reset_state import reset_stage_state

META = torch.device("meta")
"""Replaces an accelerator: weights loaded onto it were never in host memory."""


@pytest.mark.parametrize("family", ["llama_dir", "moe_dir"])
def test_weights_are_read_straight_onto_the_device(family: str, request: pytest.FixtureRequest) -> None:
    model = load_whole(str(request.getfixturevalue(family)), dtype="auto", device=META)
    assert {weight.device for weight in model.parameters()} == {META}
    assert not hasattr(model, "hf_device_map")  # trainers neither move nor shard a model that has one


def test_a_stage_reads_onto_its_workers_device(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker of a node needs host memory for the whole model first."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    data = {"sources": [{"inline": [{"prompt": "a", "completion": "b"}] * 4}]}
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "job"},
        "spec": {
            "model": {"path": str(llama_dir), "dtype": "float32"},
            "stages": [{"sft": {"data": data, "maxLength": 32}}],
            "storage": {"path": str(tmp_path / "runs")},
        },
    }
    reset_stage_state()
    context = replace(open_stage(job, tmp_path), placement=Placement(0, 0, 1, accelerator=True))
    try:
        assert {weight.device for weight in starting_model(context).parameters()} == {META}
        assert replace(context, zero=3).load_device is None  # ZeRO-3 partitions the weights while they load
    finally:
        reset_stage_state()


def test_loading_on_a_cpu_holds_the_weights_once(tmp_path: Path) -> None:
    """The weights are memory-mapped from the file, until they are written to."""
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 7, "num_attention_heads": 16}
    big = save(make_model(**wide).to(torch.bfloat16), tmp_path / "big")
    small = save(make_model().to(torch.bfloat16), tmp_path / "small")
    script = str(Path(__file__).with_name("load_peak.py"))
    command = [sys.executable, script, str(big), str(small), "bfloat16"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    peak, touched, size = map(int, output.split()[-3:])
    assert size > 150 << 20
    assert peak < 1.3 * size and touched < 1.3 * size
