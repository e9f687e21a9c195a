"""Memory is measured per stage and by allocator, on a fake accelerator that records the calls."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import torch
from support.jobs.in_process import open_stage

from finetune_api.runconfig import RunConfig
from finetune_trainer.launch import cluster, stage_run
from finetune_trainer.launch.cluster import start_ray
from finetune_trainer.launch.work_order import WorkOrder
from finetune_trainer.plan.workers import Workers
from finetune_trainer.progress.channel import WorkerChannel
from finetune_trainer.runtime import allocator_environment
from finetune_trainer.training.memory import Usage, reset_peaks, usage
from finetune_trainer.training.stage_io import StageIO
from finetune_trainer.training.stage_work import StageWork

Job = dict[str, Any]
GIB = 1 << 30


@dataclass
class StandIn:
    """A fake GPU of 80 GiB whose figures a test sets."""

    total: int = 80 * GIB
    held: int = 0
    """Bytes that torch's allocator holds."""
    outside: int = 0
    """Bytes that torch does not count, such as the CUDA context and NCCL."""
    peak: int = 0
    reserved: int = 0
    calls: list[str] = field(default_factory=list)

    def work(self, tensors: int, held: int, nccl: int = 0) -> None:
        """Use so many bytes in a stage, and free the tensors."""
        self.peak, self.reserved = max(self.peak, tensors), max(self.reserved, held)
        self.held = held
        self.outside += nccl
        self.calls.append("work")

    def reset(self) -> None:
        self.calls.append("reset")
        self.peak = self.reserved = self.held = 0

    def info(self) -> tuple[int, int]:
        self.calls.append("info")
        return self.total - self.held - self.outside, self.total


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Replace the functions of torch.cuda that measure memory."""
    device = StandIn(outside=GIB // 2)
    for name, function in {
        "reset_peak_memory_stats": device.reset,
        "max_memory_allocated": lambda: device.peak,
        "max_memory_reserved": lambda: device.reserved,
        "memory_reserved": lambda: device.held,
        "mem_get_info": device.info,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return device


class _Run:
    """Replaces a stage's training: uses memory of the fake GPU, and keeps what the stage reports."""

    device: StandIn
    reported: list[Usage]
    needs = ((40 * GIB, 60 * GIB), (3 * GIB, 4 * GIB))

    def __init__(self, context: Any, *_: Any, several_nodes: bool) -> None:
        assert not several_nodes
        self.context = context

    def train(self) -> None:
        index = len(self.reported)
        self.device.work(*self.needs[index], nccl=GIB if index == 0 else 0)
        self.reported.append(self.context.placement.usage())


def test_a_stage_does_not_report_the_peak_of_the_one_before(
    gpu: StandIn, base_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_stage(base_job, tmp_path).run
    _Run.device, _Run.reported = gpu, []
    alone = SimpleNamespace(get_world_rank=int, get_local_rank=int, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: alone)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=str))
    for name, value in {
        "WorkerChannel": lambda channel: SimpleNamespace(send=lambda event: None, heartbeat=lambda heartbeat: None),
        "answer_inquiries": lambda: None,
        "join_process_group": lambda zero, accelerator: None,
        "stage_context": lambda run, work, threads, placement, *_: SimpleNamespace(placement=placement),
        "StageRun": _Run,
        "require_gate": lambda *_: None,
        "on_waiting": lambda report: None,
    }.items():
        monkeypatch.setattr(stage_run, name, value)
    work = StageWork(index=0, zero=0, flops_per_token=0.0, peak_flops=None)
    channel: Any = None
    stage_run.run_stages(WorkOrder(_json(run), [work, replace(work)], True, 1, channel))
    first, second = _Run.reported
    assert first == Usage(peak=40 * GIB, reserved=60 * GIB, context=GIB // 2, nccl=GIB)
    assert second == Usage(peak=3 * GIB, reserved=4 * GIB, context=GIB // 2, nccl=GIB)
    assert gpu.calls == ["info", "reset", "work", "info", "reset", "work", "info"]


def _json(run: RunConfig) -> str:
    return run.model_dump_json(by_alias=True, exclude_none=True)


def test_every_line_of_progress_has_them_apart(gpu: StandIn, base_job: Job, tmp_path: Path) -> None:
    context = open_stage(base_job, tmp_path)
    context = replace(context, placement=replace(context.placement, accelerator=True, context_bytes=GIB // 2))
    gpu.work(2 * GIB, 3 * GIB, nccl=GIB)
    end: Any = _End()
    tools = StageIO(context, None, None, end, tmp_path)  # type: ignore[arg-type]
    tools.progress(1, 2)
    [line] = end.sent
    told = {name: value for name, value in line.to_json().items() if name.startswith("memory")}
    assert told == {
        "memory": 2 * GIB, "memory_reserved": 3 * GIB, "memory_context": GIB // 2, "memory_nccl": GIB
    }  # fmt: skip


class _End(WorkerChannel):
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, event: Any) -> None:
        self.sent.append(event)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets a process's peak")
def test_a_cpu_stage_measures_anew_too() -> None:
    block = torch.ones(64 << 20, dtype=torch.uint8)
    before = usage(False, 0).peak
    assert before > block.numel()
    del block
    reset_peaks(False)
    after = usage(False, 0)
    assert after.peak < before - (32 << 20)
    assert after.to_json() == {"peak": after.peak}


@pytest.mark.parametrize(
    ("accelerator", "user", "expected"),
    [
        (True, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (False, {}, {}),
        (True, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, {}),
        (True, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, {}),
    ],
)
def test_workers_on_gpus_get_expandable_segments(
    accelerator: bool, user: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default applies unless the user has configured the allocator with any of its variables."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options))
    monkeypatch.setattr(cluster, "patch_ray", lambda: None)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    start_ray(Workers(1, 1, accelerator, 1))
    env = given["runtime_env"]["env_vars"]
    assert {name: value for name, value in env.items() if "ALLOC_CONF" in name} == expected


def test_vllm_does_without_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sleep mode of vLLM does not support them."""
    monkeypatch.setattr("finetune_trainer.runtime.find_spec", lambda name: object() if name == "vllm" else None)
    assert allocator_environment(True, {}) == {}
