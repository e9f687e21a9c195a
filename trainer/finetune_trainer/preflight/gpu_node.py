"""The doctor's checks as a preflight: of the image before any GPU is claimed, of each node before it trains."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_trainer.doctor import devices, toolchain
from finetune_trainer.doctor.examine import examine
from finetune_trainer.doctor.facts import Driver
from finetune_trainer.doctor.finding import Finding, Scope, State, missing
from finetune_trainer.doctor.gather import driver_facts, gather, gather_image
from finetune_trainer.doctor.needs import job_needs
from finetune_trainer.errors import TrainingFailed, UserError
from finetune_trainer.runtime import node_name

_EXPLAINS = {
    devices.DRIVER: {devices.CUDA, devices.GPUS, toolchain.LIBCUDA},
    devices.ARCHITECTURE: {devices.CUDA},
    devices.CUDA: {devices.GPUS},
}
"""What fails because of what."""
_OF_THE_PLAN = re.compile(r"model\.attnImplementation|.*\.rlhf\.vllm")
"""Fields whose faults the plan finds (`preflight.model`, `plan.vllm`), on machines without a GPU too."""


def image_problems(run: RunConfig) -> list[Problem]:
    """Return what the image lacks for a job on GPUs. It needs no GPU, so a preflight finds it before one is claimed."""
    if not run.job.spec.resources.gpus_per_node:
        return []
    return _problems(examine(gather_image(), job_needs(run.job, 0), Scope.IMAGE))


def machine_problems(run: RunConfig, gpus: int, counted: int) -> list[Problem]:
    """Return what this machine lacks for a job on GPUs.

    Args:
        gpus: how many the job takes here, for all of its nodes together.
        counted: how many torch counts. It asks NVML, which also counts GPUs that CUDA can't use.
    """
    if not counted and driver_facts() == Driver():  # no sign of a GPU or a driver: there is nothing to look into
        message = f"{gpus} GPUs are asked for and this machine has 0"
        return [Problem("resources.gpusPerNode", message)]
    needs = replace(job_needs(run.job, gpus), gpus=gpus)
    return _problems(examine(gather(Path(run.cache_dir), ask_hub=False), needs))


def require_fit_node(run: RunConfig) -> None:
    """Check the node of an attempt's pod, where the job asks for GPUs. Warnings go to the pod's log.

    Raises:
        UserError: the image, or how the node is set up, does not suit the job: another attempt fails in the same way.
        TrainingFailed: a GPU of this node does not work: another attempt needs another node.
    """
    gpus = run.job.spec.resources.gpus_per_node
    if not gpus:
        return
    findings = examine(gather(Path(run.cache_dir), ask_hub=False), job_needs(run.job, gpus))
    for one in findings:
        if one.state is State.WARNING:
            print(f"warning: {one.name}: found {one.found}, needed {one.needed}. {one.remedy}", flush=True)
    fault = fault_of(findings, node_name())
    if fault is not None:
        raise fault


def fault_of(findings: Iterable[Finding], node: str) -> UserError | TrainingFailed | None:
    """Return what is wrong with a node, or None where nothing is missing.

    A GPU that does not work although all is set up is the node's fault. Anything else that is missing comes first.
    """
    lacks = causes(missing(findings))
    if not lacks:
        return None
    if not all(one.device for one in lacks):
        return UserError([one.problem for one in lacks])
    text = "; ".join(f"{one.name}: found {one.found}, needed {one.needed}" for one in lacks)
    return TrainingFailed(f"GPU fault on node {node}: {text}", lacks[0].remedy, node)


def causes(lacks: Iterable[Finding]) -> list[Finding]:
    """Return the findings that no other one explains: without a driver there is no CUDA and no GPU."""
    found = list(lacks)
    explained = set().union(*(_EXPLAINS.get(one.name, set()) for one in found))
    return [one for one in found if one.name not in explained]


def _problems(findings: list[Finding]) -> list[Problem]:
    return [one.problem for one in causes(missing(findings)) if not _OF_THE_PLAN.fullmatch(one.field)]
