"""Run the checks of `finetune doctor`: of the image before GPUs are requested, and of each node before training."""

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
"""Checks that fail as a consequence of another failed check."""
_OF_THE_PLAN = re.compile(r"model\.attnImplementation|.*\.rlhf\.vllm")
"""Fields whose faults the plan reports (`preflight.model`, `plan.vllm`), also on machines without a GPU."""


def image_problems(run: RunConfig) -> list[Problem]:
    """Return what the image lacks for a job on GPUs. The check needs no GPU, so it runs before GPUs are requested."""
    if not run.job.spec.resources.gpus_per_node:
        return []
    return _problems(examine(gather_image(), job_needs(run.job, 0), Scope.IMAGE))


def machine_problems(run: RunConfig, gpus: int, counted: int) -> list[Problem]:
    """Return what this machine lacks for a job on GPUs.

    Args:
        gpus: number of GPUs that the job uses on this machine, for all of its nodes together.
        counted: number of GPUs according to torch, which uses NVML and includes GPUs that CUDA cannot use.
    """
    if not counted and driver_facts() == Driver():  # neither a GPU nor a driver: nothing to examine
        message = f"{gpus} GPUs are asked for and this machine has 0"
        return [Problem("resources.gpusPerNode", message)]
    needs = replace(job_needs(run.job, gpus), gpus=gpus)
    return _problems(examine(gather(Path(run.cache_dir), ask_hub=False), needs))


def require_fit_node(run: RunConfig) -> None:
    """Check the node of a pod if the job requests GPUs. Warnings are printed to the log of the pod.

    Raises:
        UserError: the image or the node does not meet the requirements: a retry would fail in the same way.
        TrainingFailed: a GPU of this node does not work: a retry needs another node.
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
    """Return the error for a node, or None if nothing is missing.

    Missing requirements take precedence. A GPU that does not work although all of them are met is a fault of the node.
    """
    lacks = causes(missing(findings))
    if not lacks:
        return None
    if not all(one.device for one in lacks):
        return UserError([one.problem for one in lacks])
    text = "; ".join(f"{one.name}: found {one.found}, needed {one.needed}" for one in lacks)
    return TrainingFailed(f"GPU fault on node {node}: {text}", lacks[0].remedy, node)


def causes(lacks: Iterable[Finding]) -> list[Finding]:
    """Return the findings that are not a consequence of another one: without a driver, CUDA and GPUs fail too."""
    found = list(lacks)
    explained = set().union(*(_EXPLAINS.get(one.name, set()) for one in found))
    return [one for one in found if one.name not in explained]


def _problems(findings: list[Finding]) -> list[Problem]:
    return [one.problem for one in causes(missing(findings)) if not _OF_THE_PLAN.fullmatch(one.field)]
