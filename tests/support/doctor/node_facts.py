"""Facts of GPU nodes for the doctor's checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune_trainer.doctor.facts import Driver, Fabric, Facts, Gpu, Host, Hub, Package, Toolchain, Torch
from finetune_trainer.doctor.needs import Needs

H100, V100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30), Gpu("Tesla V100-SXM2-32GB", (7, 0), 32 << 30)
T4, H200 = Gpu("Tesla T4", (7, 5), 15 << 30), Gpu("NVIDIA H200", (9, 0), 140 << 30)
TORCH = Torch("2.13.0+cu130", "13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"), "2.29.7", (H100,) * 8)
GOOD = Facts(
    Toolchain("3.7.1", "/usr/bin/gcc"),
    TORCH,
    Driver("580.65.06", True, 8, 8),
    {"bitsandbytes": Package("0.50.2")},
    ("126", "130"),
    Host(64 << 30, 1 << 20, 2000 << 30, "/cache", 500 << 30),
    Fabric(("uverbs0",), ("mlx5_0",), None, False, True),
    Hub(asked=True),
)
"""A node with eight H100 on which every check succeeds."""
NEEDS = Needs(8, 2, "stages[0].sft", "stages[0].sft", hub="model.hub")
TOO_OLD = "RuntimeError: The NVIDIA driver on your system is too old (found version 12040). Please update your driver"
OLD = replace(GOOD, driver=Driver("550.90.07", False, 8, 8), torch=replace(TORCH, gpus=(), error=TOO_OLD))


def with_parts(**parts: dict[str, Any]) -> Facts:
    """Return the good node with changed fields of some parts."""
    return replace(GOOD, **{name: replace(getattr(GOOD, name), **fields) for name, fields in parts.items()})
