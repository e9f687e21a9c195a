"""The plan's host memory of a node, each term compared with a hand calculation."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from support.plan.planned_jobs import DATA, run, text_of

from finetune_trainer.launch.cluster_preflight import _plan_report
from finetune_trainer.plan import PlanContext, plan_job
from finetune_trainer.plan.devices import Device, known_device
from finetune_trainer.plan.host import DATA_WORKER, DRIVER, PROCESS, HostMemory
from finetune_trainer.plan.records import JobPlan
from finetune_trainer.preflight.host import host_problems

LLAMA_70B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
N = 70_553_706_496
"""Number of weights of Llama-3-70B."""
GPUS = PlanContext(known_device("A100-80GB") or Device("", 0, ""), workers=2)
NODE = {"nodes": 1, "gpusPerNode": 2}
QLORA = {"data": DATA, "maxLength": 1024, "lora": {"r": 16}, "quantization": {"bits": 4}}
SHARD = 5_000_000_000


@cache
def qlora() -> JobPlan:
    return plan_job(run({"sft": QLORA}, model=LLAMA_70B, resources=NODE), GPUS)


def host(
    stage: dict[str, Any], resources: dict[str, Any] = NODE, context: PlanContext = GPUS, **spec: Any
) -> HostMemory:
    (plan,) = plan_job(run({"sft": stage}, model=LLAMA_70B, resources=resources, **spec), context).stages
    assert plan.host is not None
    return plan.host


def test_merging_qlora_of_a_70b_model() -> None:
    """The merge of a 70B QLoRA adapter needs the memory of one output file.

    In addition it needs the largest merged weight (of an MLP) in bfloat16 and float32 with its update, and the adapter
    in float32. The whole base in float32 would take 282 GB.
    """
    found = qlora().stages[0].host
    assert found is not None
    mlp, layers, r = 8192 * 28672, 80, 16
    kv = 8 * 128
    features = (8192 + 8192) * 2 + (8192 + kv) * 2 + (8192 + 28672) * 3
    adapter = layers * r * features
    assert adapter == 207_093_760
    assert found.merging == SHARD + mlp * (2 + 4 + 4) + adapter * 4 == 8_177_185_280
    assert found.processes == 2 * PROCESS + DRIVER and found.data == found.offloaded == 0
    assert found.loading == 2 * 128256 * 8192 * (2 + 2)
    assert found.total == found.processes + max(found.loading, found.saving, found.merging)
    assert found.total < 0.1 * 4 * N


def test_what_is_not_merged_takes_no_memory_for_it() -> None:
    found = host(QLORA | {"lora": {"r": 16, "merge": False}})
    assert found.merging == 0 and found.saving == 207_093_760 * 4


def test_full_training_and_what_it_offloads() -> None:
    """ZeRO-3 offloads weights and optimizer states on 2 nodes of 8 GPUs.

    Each node holds half of the 12 bytes of optimizer states and 2 bytes of weights per parameter. The result is the
    whole model in bfloat16 on the first node.
    """
    stage = {"data": DATA, "maxLength": 1024, "dataloaderNumWorkers": 3}
    sharding = {"zero": 3, "offloadOptimizer": True, "offloadParam": True}
    nodes = {"nodes": 2, "gpusPerNode": 8}
    found = host(stage, nodes, replace(GPUS, workers=16), sharding=sharding)
    assert found.offloaded == pytest.approx(N * (12 + 2) / 2, rel=1e-6)
    assert found.saving == max(N * 2, 8 * -(-N * 4 // 16)) and found.merging == 0
    assert found.data == 8 * 3 * DATA_WORKER
    assert found.loading == 128256 * 8192 * (2 + 2)


def test_the_plan_shows_it_and_tells_the_operator() -> None:
    plan = qlora()
    (stage,) = plan.stages
    assert stage.host is not None
    assert "host memory of a node: 15.8 GiB (processes 8 GiB, loading 7.83 GiB" in text_of(plan)
    assert plan.to_json()["stages"][0]["host"]["total"] == stage.host.total == _plan_report(plan)["hostBytes"]


@pytest.mark.parametrize(
    ("memory", "machine", "expected"),
    [
        ("8Gi", None, "got 8Gi, but stages[0].sft needs 15.8 GiB (processes 8 GiB, loading"),
        ("16Gi", None, None),
        (None, 10 << 30, "this machine has 10 GiB free, but stages[0].sft needs 15.8 GiB"),
        (None, 16 << 30, None),
        (None, None, None),
    ],
)
def test_too_little_is_told_before_anything_starts(
    memory: str | None, machine: int | None, expected: str | None
) -> None:
    job = run({"sft": QLORA}, model=LLAMA_70B, resources=NODE | ({"memoryPerNode": memory} if memory else {}))
    problems = list(host_problems(job, qlora(), machine))
    assert [problem.path for problem in problems] == ([] if expected is None else ["resources.memoryPerNode"])
    assert expected is None or problems[0].message.startswith(expected)
    assert memory != "8Gi" or "set it to at least 16Gi" in problems[0].message
