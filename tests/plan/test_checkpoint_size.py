"""Checkpoint sizes compared with hand calculations and real checkpoints; saving time, free space and grace period."""

from __future__ import annotations

import dataclasses
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from support.plan.tiny_models import tiny

from finetune_api.report import PlanReport
from finetune_api.runconfig import RunConfig
from finetune_trainer.launch.cluster_preflight import _saving_report
from finetune_trainer.plan.devices import Device
from finetune_trainer.plan.job import plan_job
from finetune_trainer.plan.memory import Workload
from finetune_trainer.plan.model_size import AdapterSize, ModelSize, meta_model, model_size
from finetune_trainer.plan.records import JobPlan, PlanContext
from finetune_trainer.plan.saving import (
    WRITE_BYTES_PER_SECOND,
    checkpoint_bytes,
    grace_seconds,
    grace_warning,
    node_bytes,
    saving,
)
from finetune_trainer.preflight.saving import job_saving, measured_speed, room_problems
from finetune_trainer.storage.filesystem import Storage

LLAMA_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "head_dim": 128,
}  # fmt: skip
WEIGHTS_70B = 70_553_706_496
"""Llama 3 70B: 2 x 128256 x 8192 (embeddings, head) + 80 layers x 8192 x (2 x 9216 + 3 x 28672 + 2 norms) + 8192."""
LORA_70B = 80 * 16 * ((8192 + 8192) * 2 + (8192 + 1024) * 2 + (8192 + 28672) * 3)
"""Rank 16 on every linear layer: 207,093,760 parameters."""


@pytest.fixture(scope="module")
def llama() -> ModelSize:
    return model_size(meta_model(tiny("llama", **LLAMA_70B)))


def load(zero: int, **fields: Any) -> Workload:
    return Workload(batch=1, length=128, zero=zero, workers=64, **fields)


def test_a_full_70b_checkpoint(llama: ModelSize) -> None:
    assert llama.total == WEIGHTS_70B
    # ZeRO-3: a float32 master weight and two moments per weight, 12 bytes; the master weights are the weights.
    assert checkpoint_bytes(llama, load(3)) == WEIGHTS_70B * 12 == 846_644_477_952
    # ZeRO-2: additional bfloat16 weights, 14 bytes.
    assert checkpoint_bytes(llama, load(2)) == WEIGHTS_70B * 14
    # ZeRO-0: float32 weights and two moments, 12 bytes.
    assert checkpoint_bytes(llama, load(0)) == WEIGHTS_70B * 12


def test_a_70b_lora_checkpoint_has_the_adapter_alone(llama: ModelSize) -> None:
    adapter = AdapterSize(LORA_70B, 0, 0)
    assert LORA_70B == 207_093_760
    assert checkpoint_bytes(llama, load(3, adapter=adapter)) == LORA_70B * 12 == 2_485_125_120
    assert checkpoint_bytes(llama, load(2, adapter=adapter, quantized_bits=4)) == LORA_70B * 14
    assert checkpoint_bytes(llama, load(0, adapter=adapter)) == LORA_70B * 12


@pytest.mark.parametrize(
    ("zero", "parameters", "measured"),
    [(0, 151_104, 605_544 + 1_224_688), (3, 151_104, 910_207 * 2), (0, 203_008, 813_544 + 1_650_123)],
)
def test_sizes_of_checkpoints_that_were_written(zero: int, parameters: int, measured: int, llama: ModelSize) -> None:
    """The weights and optimizer files are of runs of tiny float32 models (transformers 5.23, DeepSpeed 0.19.8)."""
    size = dataclasses.replace(llama, total=parameters, frozen=0)
    estimated = checkpoint_bytes(size, Workload(batch=1, length=8, dtype_bytes=4, zero=zero, workers=2))
    assert estimated == pytest.approx(measured, rel=0.02)


def test_some_experts_with_their_frozen_model(llama: ModelSize) -> None:
    tuned, frozen = 10**9, WEIGHTS_70B - 10**9
    assert checkpoint_bytes(llama, load(0, tuned=tuned)) == tuned * 12, "trained experts alone"
    assert checkpoint_bytes(llama, load(3, tuned=tuned)) == tuned * 12 + frozen * 2


def test_a_node_writes_its_share_and_the_grace_period_is_held_against_it() -> None:
    total = WEIGHTS_70B * 12
    assert node_bytes(total, 3, 8) == total // 8 and node_bytes(total, 0, 8) == total
    found = saving([(total, 3)], nodes=8, bytes_per_second=None)
    assert found is not None and found.bytes_per_second == WRITE_BYTES_PER_SECOND and not found.measured
    assert found.seconds == pytest.approx(total / 8 / 200e6) and 500 < found.seconds < 560
    words = grace_warning(found, 120)
    assert words.startswith("kubernetes.checkpointGraceSeconds: is 120") and "Set it to 900" in words
    assert grace_seconds(found) == 900 and grace_warning(found, 900) == ""
    fast = saving([(total, 3)], nodes=8, bytes_per_second=2e9)
    assert fast is not None and grace_warning(fast, 120) == "" and "measured" not in grace_warning(fast, 120)
    assert saving([(0, 0)], 1, None) is None


def run_of(root: str, **kubernetes: Any) -> RunConfig:
    storage = {"uri": root} if "://" in root else {"path": root}
    sft = {"data": {"sources": [{"inline": [{"text": "x"}]}]}, "maxSteps": 2, "maxLength": 32}
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "big"},
        "spec": {
            "model": {"hub": "acme/big"}, "stages": [{"sft": sft}], "storage": storage,
            "sharding": {"zero": 3}, "resources": {"nodes": 8, "gpusPerNode": 8}, "kubernetes": kubernetes,
        },
    }  # fmt: skip
    return RunConfig.model_validate({"job": job, "root": f"{root}/big", "baseDir": "/", "cacheDir": "/nowhere/cache"})


def planned(run: RunConfig) -> JobPlan:
    context = PlanContext(Device("NVIDIA H100", 80 << 30, "cuda"), 64, tiny("llama", **LLAMA_70B))
    return plan_job(run, context)


def test_the_plan_has_the_checkpoint_and_preflight_refuses_a_disk_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**12, 9 * 10**11, 10**11))
    run = run_of(str(tmp_path))
    plan = planned(run)
    assert plan.stages[0].checkpoint == WEIGHTS_70B * 12
    (problem,) = room_problems(run, plan, on_node=True)
    assert problem.path == "storage.path" and "788 GiB" in problem.message and str(tmp_path) in problem.message
    done = tmp_path / "big/stages/00-sft/done.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    assert list(room_problems(run, plan, on_node=True)) == [], "a finished stage saves nothing any more"


def test_a_nodes_cache_must_hold_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**12, 95 * 10**10, 5 * 10**10))
    small, none = run_of("memory://runs", cacheSizeLimit="50Gi"), run_of("memory://runs")
    plan = planned(small)
    (problem,) = room_problems(small, plan, on_node=False)
    assert problem.path == "kubernetes.cacheSizeLimit" and "got 50Gi" in problem.message
    assert list(room_problems(none, plan, on_node=False)) == [], "a preflight pod has another cache"
    (problem,) = room_problems(none, plan, on_node=True)
    assert problem.path == "kubernetes.cacheSizeLimit" and "98.6 GiB" in problem.message


def test_preflight_reports_the_checkpoint_and_warns_of_the_grace_period(tmp_path: Path) -> None:
    run = run_of(str(tmp_path), checkpointGraceSeconds=1)
    told = PlanReport.model_validate({"parameters": 1} | _saving_report(run, planned(run)))
    assert told.checkpoint_bytes == WEIGHTS_70B * 12 and told.save_seconds is not None
    (warning,) = told.warnings
    assert warning.startswith("kubernetes.checkpointGraceSeconds: is 1") and "(measured)" in warning
    patient = run_of(str(tmp_path), checkpointGraceSeconds=86400)
    assert "warnings" not in _saving_report(patient, planned(patient))


def test_the_stores_speed_is_measured_and_nothing_is_left() -> None:
    run = run_of("memory://speed")
    plan, storage = planned(run), Storage("memory://speed/big")
    speed = measured_speed(storage, plan)
    assert speed is not None and speed > 0 and storage.names("") == []
    found = job_saving(run, plan, speed)
    assert found is not None and found.measured and found.node == -(-WEIGHTS_70B * 12 // 8)
