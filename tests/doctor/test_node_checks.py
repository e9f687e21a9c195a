"""A table of facts of a machine and of the results of each check."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.doctor.node_facts import GOOD, H100, H200, NEEDS, OLD, T4, TORCH, V100, with_parts

from finetune_api.device_faults import FaultKind
from finetune_api.job import FineTuneJob
from finetune_api.validation import check_job
from finetune_trainer.doctor.examine import IMAGE_CHECKS, NODE_CHECKS, examine
from finetune_trainer.doctor.facts import Driver, Facts, Gpu, Hub, Package, Toolchain
from finetune_trainer.doctor.finding import Finding, Scope, State, missing
from finetune_trainer.doctor.needs import Needs, gpu_node, job_needs


def found(facts: Facts, needs: Needs, name: str) -> Finding:
    return next(one for one in examine(facts, needs) if one.name.startswith(name))


def test_a_good_node_lacks_nothing() -> None:
    assert {one.state for one in examine(GOOD, NEEDS)} <= {State.OK, State.NOT_NEEDED}
    assert all(one.remedy == "" for one in examine(GOOD, NEEDS))


CASES: dict[str, tuple[Facts, Needs, str, State, str, str]] = {
    "no compiler": (
        with_parts(toolchain={"compiler": None, "error": "Failed to find C compiler."}), NEEDS, "C compiler",
        State.MISSING, "no compiler on PATH", "Install gcc, libc6-dev"),
    "no headers": (
        with_parts(toolchain={"error": "cuda_utils.c:9:10: fatal error: Python.h: No such file or directory"}), NEEDS,
        "C compiler", State.MISSING, "Python.h", "Python's headers"),
    "no compiler for a job that may do without": (
        with_parts(toolchain={"error": "no"}), replace(NEEDS, compiled=""), "C compiler", State.WARNING, "no",
        "Install"),
    "a job on CPUs needs none": (Facts(), Needs(0), "C compiler", State.NOT_NEEDED, "none", ""),
    "torch for CPUs": (
        with_parts(torch={"version": "2.13.0+cpu", "cuda": None}), NEEDS, "torch with CUDA", State.MISSING,
        "built without CUDA", "CUDA index"),
    "an old driver": (OLD, NEEDS, "NVIDIA driver", State.MISSING, "550.90.07", "580 or newer"),
    "an old driver whose version is unknown": (
        replace(OLD, driver=Driver()), NEEDS, "NVIDIA driver", State.MISSING, "one for CUDA 12.4", "580 or newer"),
    "an old driver with CUDA's compatibility package": (
        with_parts(driver={"version": "550.90.07"}), NEEDS, "NVIDIA driver", State.OK, "forward compatibility", ""),
    "no driver, with GPUs": (
        replace(GOOD, driver=Driver(on_bus=8), torch=replace(TORCH, gpus=(), error="no driver")), NEEDS,
        "NVIDIA driver",
        State.MISSING, "8 NVIDIA devices on the PCI bus", "Install"),
    "WSL, where the kernel tells no version": (
        replace(GOOD, driver=Driver()), NEEDS, "NVIDIA driver", State.OK, "unknown version", ""),
    "fewer GPUs than asked for": (
        with_parts(torch={"gpus": (H100,) * 7}), NEEDS, "GPUs", State.MISSING, "7 x NVIDIA H100 80GB HBM3 (80 GiB)",
        "Set"),
    "GPUs of two kinds": (
        with_parts(torch={"gpus": (H100, H200) * 4}), NEEDS, "GPUs", State.OK,
        "4 x NVIDIA H100 80GB HBM3 (80 GiB), 4 x", ""),
    "a GPU that computes no more": (
        with_parts(torch={"error": "AcceleratorError: CUDA error: uncorrectable ECC error encountered"}), NEEDS, "CUDA",
        State.MISSING, "uncorrectable ECC", "nvidia-smi"),
    "a GPU that torch has no code for": (
        with_parts(torch={"gpus": (V100,) * 8, "error": "no kernel image is available for execution on the device"}),
        NEEDS,
        "GPU architecture", State.MISSING, "Tesla V100-SXM2-32GB sm_70", "without Tesla V100"),
    "a GPU newer than torch, by PTX": (
        with_parts(torch={"gpus": (Gpu("X", (13, 0), 1),) * 8, "architectures": ("sm_90", "compute_120")}), NEEDS,
        "GPU architecture", State.OK, "sm_130", ""),
    "a GPU newer than torch": (
        with_parts(torch={"gpus": (Gpu("X", (13, 0), 1),) * 8}), NEEDS, "GPU architecture", State.MISSING, "sm_130",
        "without X"),
    "bfloat16 by emulation": (
        with_parts(torch={"gpus": (T4,) * 8}), NEEDS, "bfloat16", State.WARNING, "emulated on Tesla T4", "float16"),
    "float16 needs no bfloat16": (
        with_parts(torch={"gpus": (T4,) * 8}), replace(NEEDS, dtype="float16"), "bfloat16", State.NOT_NEEDED,
        "not used", ""),
    "no libcuda": (
        with_parts(toolchain={"libcuda_error": "libcuda.so cannot found!"}), NEEDS, "libcuda", State.MISSING,
        "cannot found",
        "TRITON_LIBCUDA_PATH"),
    "no NCCL": (with_parts(torch={"nccl": None}), NEEDS, "NCCL", State.MISSING, "none", "Install"),
    "NCCL for one GPU": (with_parts(torch={"nccl": None}), Needs(1), "NCCL", State.NOT_NEEDED, "none", ""),
    "bitsandbytes for another CUDA": (
        replace(GOOD, bitsandbytes_cudas=("118", "126")), NEEDS, "bitsandbytes", State.MISSING, "for CUDA 118 126",
        "Install a bitsandbytes"),
    "bitsandbytes for a newer minor version": (
        replace(GOOD, bitsandbytes_cudas=("132",)), NEEDS, "bitsandbytes", State.OK, "132", ""),
    "no quantization": (
        replace(GOOD, packages={}), replace(NEEDS, quantized=""), "bitsandbytes", State.NOT_NEEDED, "not installed",
        ""),
    "flash-attention 2 is not there": (
        GOOD, replace(NEEDS, attention="flash_attention_2"), "flash-attn", State.MISSING, "not installed",
        "flash_attn"),
    "flash-attention 3 that does not load": (
        replace(GOOD, packages={"flash_attn_interface": Package("3.0", "ImportError: undefined symbol: _ZN3c104cuda")}),
        replace(NEEDS, attention="flash_attention_3"), "flash-attn", State.MISSING, "undefined symbol", "sdpa"),
    "RLHF without vLLM": (
        GOOD, replace(NEEDS, vllm="stages[1].rlhf"), "vLLM", State.WARNING, "not installed", "vllm to off"),
    "vLLM for another torch": (
        replace(GOOD, packages={"vllm": Package("0.33.0")}), replace(NEEDS, vllm="stages[1].rlhf"), "vLLM",
        State.MISSING, "0.33.0", "vllm==0.30.*"),
    "vLLM for this torch": (
        replace(GOOD, packages={"vllm": Package("0.30.1")}), replace(NEEDS, vllm="stages[1].rlhf"), "vLLM", State.OK,
        "0.30.1", ""),
    "docker's /dev/shm": (
        with_parts(host={"shm_bytes": 64 << 20}), NEEDS, "/dev/shm", State.WARNING, "64 MiB",
        "kubernetes.sharedMemory"),
    "no /dev/shm": (with_parts(host={"shm_bytes": None}), NEEDS, "/dev/shm", State.MISSING, "none", "sharedMemory"),
    "adapters that the pod does not have": (
        with_parts(fabric={"devices": ()}), NEEDS, "RDMA devices", State.WARNING, "mlx5_0 on the machine",
        "device plugin"),
    "an RDMA device that the job asks for": (
        with_parts(fabric={"devices": (), "adapters": ()}), replace(NEEDS, rdma=True), "RDMA devices", State.MISSING,
        "none",
        "rdma/hca"),
    "one node needs no RDMA": (
        with_parts(fabric={"devices": ()}), replace(NEEDS, nodes=1), "RDMA devices", State.NOT_NEEDED, "none", ""),
    "containerd's memlock": (
        with_parts(fabric={"locked_bytes": 8 << 20}), NEEDS, "Locked memory", State.WARNING,
        "8192 KiB, CAP_IPC_LOCK not in effect", "LimitMEMLOCK=infinity"),
    "IPC_LOCK in effect": (
        with_parts(fabric={"locked_bytes": 8 << 20, "ipc_lock": True}), NEEDS, "Locked memory", State.OK, "in effect",
        ""),
    "no GPUDirect": (
        with_parts(fabric={"peer_memory": False}, driver={"open_module": False}), NEEDS, "GPUDirect", State.WARNING,
        "none",
        "modprobe nvidia-peermem"),
    "GPUDirect by DMA-BUF": (
        with_parts(fabric={"peer_memory": False}), NEEDS, "GPUDirect", State.OK, "open kernel module", ""),
    "a small limit on files": (
        with_parts(host={"open_files": 1024}), NEEDS, "Open files", State.WARNING, "1,024", "ulimit -n"),
    "a full disk": (
        with_parts(host={"cache_free_bytes": 3 << 30}), NEEDS, "Cache", State.WARNING, "3 GiB free in /cache",
        "FINETUNE_CACHE"),
    "less memory than the job says": (
        with_parts(host={"memory_bytes": 10 << 30}), replace(NEEDS, memory="64Gi"), "Host memory", State.WARNING,
        "10 GiB",
        "resources.memoryPerNode"),
    "offline": (replace(GOOD, hub=Hub(offline=True)), NEEDS, "Hugging Face", State.WARNING, "HF_HUB_OFFLINE", "cache"),
    "a hub that is away": (
        replace(GOOD, hub=Hub(asked=True, error="timed out")), NEEDS, "Hugging Face", State.WARNING, "timed out",
        "HF_ENDPOINT"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_check(name: str) -> None:
    facts, needs, check, state, says, remedy = CASES[name]
    one = found(facts, needs, check)
    assert one.state is state, one
    assert says in one.found and remedy in one.remedy
    assert bool(one.remedy) is (state in (State.MISSING, State.WARNING))


def test_a_job_on_cpus_needs_nothing_of_a_gpu() -> None:
    assert missing(examine(Facts(), Needs(0))) == []


def test_without_a_job_and_without_gpus_all_that_a_gpu_node_needs_is_named() -> None:
    names = {one.name for one in missing(examine(Facts(toolchain=Toolchain("3.7.1", error="none")), gpu_node()))}
    assert names == {"C compiler and Python headers", "torch with CUDA", "bitsandbytes for CUDA", "NVIDIA driver",
    "GPUs",
                     "CUDA"}  # fmt: skip


def test_every_check_has_the_scope_under_which_it_is_listed() -> None:
    for scope, checks in ((Scope.IMAGE, IMAGE_CHECKS), (Scope.NODE, NODE_CHECKS)):
        assert {check(GOOD, NEEDS).scope for check in checks} == {scope}
        assert {check(Facts(), gpu_node()).scope for check in checks} == {scope}
    assert len(examine(GOOD, NEEDS, Scope.IMAGE)) + len(examine(GOOD, NEEDS, Scope.NODE)) == len(examine(GOOD, NEEDS))


GUIDE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()


def first_cells(heading: str) -> set[str]:
    """Return the words in the first column of the table below a heading of the guide."""
    section = GUIDE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)[1:])


def test_every_check_and_every_class_of_fault_is_in_the_guide() -> None:
    named = first_cells("What a GPU node needs")
    assert {one.name for one in examine(GOOD, NEEDS)} - named == {
        "Host memory", "Open files (ulimit -n)", "Cache directory", "Hugging Face hub"}  # fmt: skip
    assert "Host memory, open files, cache directory, Hugging Face hub" in named
    assert first_cells("Device faults") == {kind.value for kind in FaultKind}


def job(stages: list[dict[str, Any]], model: dict[str, Any] | None = None, **spec: Any) -> FineTuneJob:
    made, problems = check_job({
        "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "tiny"},
        "spec": {"model": model or {"path": "/m"}, "stages": stages, "storage": {"path": "runs"}, **spec},
    })  # fmt: skip
    assert made is not None, problems
    return made


DATA = {"sources": [{"inline": [{"prompt": "a", "completion": "b"}]}]}
SFT = {"sft": {"data": DATA}}


def test_needs_follow_from_the_job() -> None:
    quantized = {"sft": {"data": DATA, "lora": {}, "quantization": {"bits": 4}}}
    limits = {"nvidia.com/gpu": 8, "rdma/hca_shared_devices_a": 1}
    template = {"spec": {"containers": [{"name": "trainer", "resources": {"limits": limits}}]}}
    needs = job_needs(
        job([SFT, quantized], {"hub": "a/b", "attnImplementation": "flash_attention_3", "dtype": "bfloat16"},
            resources={"nodes": 2, "gpusPerNode": 8, "memoryPerNode": "64Gi", "podTemplate": template}), 0)  # fmt: skip
    assert needs == Needs(
        8, 2, "stages[0].sft", "stages[1].sft", "flash_attention_3", "bfloat16", "", "model.hub", True, "64Gi"
    )


@pytest.mark.parametrize(
    ("resources", "here", "gpus", "nodes"),
    [
        ({}, 0, 0, 1),
        ({}, 4, 4, 1),
        ({"gpusPerNode": 0}, 4, 0, 1),
        ({"minNodes": 1, "maxNodes": 3, "gpusPerNode": 2}, 0, 2, 3),
    ],
)
def test_gpus_and_nodes_of_a_job(resources: dict[str, Any], here: int, gpus: int, nodes: int) -> None:
    needs = job_needs(job([SFT], resources=resources), here)
    assert (needs.gpus, needs.nodes) == (gpus, nodes)


def test_what_trains_no_language_model_needs_no_compiler() -> None:
    rows = {"sources": [{"inline": [{"text": "a"}]}]}
    config = {"config": {"model_type": "bert"}}
    masked = [{"tokenizer": {"data": rows}}, {"pretrain": {"data": rows, "objective": "masked", "maxSteps": 1}}]
    assert job_needs(job(masked, config), 1).compiled == ""
    pairs = {"sources": [{"inline": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}]}
    assert job_needs(job([{"reward": {"data": pairs}}, {"dpo": {"data": pairs}}]), 1).compiled == "stages[1].dpo"


@pytest.mark.parametrize(
    "template", [{"spec": []}, {"spec": {"containers": "x"}}, {"spec": {"containers": [{"resources": 1}]}}]
)
def test_a_pod_template_of_another_form_asks_for_no_rdma(template: dict[str, Any]) -> None:
    assert not job_needs(job([SFT], resources={"podTemplate": template}), 0).rdma
