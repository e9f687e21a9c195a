from __future__ import annotations

import pytest
import torch

from finetune_trainer.host_memory import host_memory
from finetune_trainer.plan.devices import known_device, local_device, peak_flops
from finetune_trainer.plan.quantities import human_bytes, human_count, parse_quantity


@pytest.mark.parametrize(
    ("text", "value"),
    [("64Gi", 64 << 30), ("8", 8), ("1.5G", 15 * 10**8), ("500m", 1), ("2k", 2000), ("1Ki", 1024), ("0.5Mi", 1 << 19)],
)
def test_quantities(text: str, value: int) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize("text", ["", "Gi", "1GB", "-1", "1 Gi", "1e3", "1gi"])
def test_not_a_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="expected a quantity such as 64Gi"):
        parse_quantity(text)


def test_numbers_for_people() -> None:
    assert human_bytes(1536) == "1.5 KiB"
    assert human_bytes(80 << 30) == "80 GiB"
    assert human_bytes(1001 << 20) == "1001 MiB"
    assert human_bytes(5 << 40) == "5 TiB"
    assert human_count(8_030_261_248) == "8.03 B"


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 19.5),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H100 NVL", torch.float16, 835.5),
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA A10G", torch.bfloat16, 70),
        ("NVIDIA A10", torch.bfloat16, 125),
        ("Tesla T4", torch.float16, 65),
        ("Tesla V100-SXM2-16GB", torch.float16, 125),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA RTX A6000", torch.bfloat16, 154.8),
    ],
)
def test_peaks(name: str, dtype: torch.dtype, teraflops: float) -> None:
    assert peak_flops(name, dtype) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    ["CPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"],
)
def test_unknown_peaks(name: str) -> None:
    assert peak_flops(name, torch.bfloat16) is None


def test_no_bfloat16_before_ampere() -> None:
    assert peak_flops("Tesla T4", torch.bfloat16) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_cpu_worker_has_its_share_of_free_memory() -> None:
    device = local_device(workers=4)
    assert (device.name, device.kind) == ("CPU", "cpu")
    assert device.memory_bytes == pytest.approx(host_memory() / 4, rel=0.2)


def test_known_devices_by_any_case() -> None:
    device = known_device("a100-80gb")
    assert device is not None and device.memory_bytes == 80 << 30
    assert peak_flops(device.name, torch.bfloat16) == 312e12
    assert known_device("A1000") is None
