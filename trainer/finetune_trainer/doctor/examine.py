"""All checks, in the order of the table (pure)."""

from __future__ import annotations

from collections.abc import Callable

from finetune_trainer.doctor import devices, fabric, host, libraries, toolchain
from finetune_trainer.doctor.facts import Facts
from finetune_trainer.doctor.finding import Finding, Scope
from finetune_trainer.doctor.needs import Needs

Check = Callable[[Facts, Needs], Finding]
OF_IMAGE: tuple[Check, ...] = (
    toolchain.compiler,
    devices.torch_build,
    libraries.bitsandbytes,
    libraries.flash_attention,
    libraries.vllm,
)
OF_NODE: tuple[Check, ...] = (
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
        scope: only the checks of the image, which need no GPU, or only those of the node. Default: all.
    """
    checks = {Scope.IMAGE: OF_IMAGE, Scope.NODE: OF_NODE, None: OF_IMAGE + OF_NODE}[scope]
    return [check(facts, needs) for check in checks]
