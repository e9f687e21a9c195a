"""Runs all checks, in the order of the table. Pure."""

from __future__ import annotations

from collections.abc import Callable

from finetune_trainer.doctor import devices, fabric, host, libraries, toolchain
from finetune_trainer.doctor.facts import Facts
from finetune_trainer.doctor.finding import Finding, Scope
from finetune_trainer.doctor.needs import Needs

Check = Callable[[Facts, Needs], Finding]
IMAGE_CHECKS: tuple[Check, ...] = (
    toolchain.compiler,
    devices.torch_build,
    libraries.bitsandbytes,
    libraries.flash_attention,
    libraries.vllm,
)
NODE_CHECKS: tuple[Check, ...] = (
    devices.driver,
    devices.gpus,
    devices.cuda,
    devices.architecture,
    devices.bfloat16,
    toolchain.libcuda,
    devices.nccl,
    host.shared_memory,
    fabric.rdma_devices,
    fabric.locked_memory,
    fabric.peer_memory,
    host.memory,
    host.open_files,
    host.cache,
    host.hub,
)


def examine(facts: Facts, needs: Needs, scope: Scope | None = None) -> list[Finding]:
    """Return one finding for each check.

    Args:
        facts: facts of the machine.
        needs: needs of the job.
        scope: run only the checks of the image, which need no GPU, or only those of the node. Default: all.
    """
    checks = {Scope.IMAGE: IMAGE_CHECKS, Scope.NODE: NODE_CHECKS, None: IMAGE_CHECKS + NODE_CHECKS}[scope]
    return [check(facts, needs) for check in checks]
