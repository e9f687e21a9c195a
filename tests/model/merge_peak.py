"""Print the bytes by which merging an adapter raises this process's peak memory.

Usage: python merge_peak.py RESULT OUT SHARD_BYTES WARM_UP_RESULT
"""

from __future__ import annotations

import sys
from pathlib import Path


def resident(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) << 10


def main(result: str, out: str, shard: str, warm_up: str) -> None:
    from finetune_trainer.model import weights

    weights.SHARD_SIZE = int(shard)  # type: ignore[assignment]  # before any module imports it
    import torch

    from finetune_trainer.generation.merge import merge

    torch.set_num_threads(1)
    merge(warm_up, Path(f"{out}-warm"))
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current memory
    before = resident("VmRSS")
    merge(result, Path(out))
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
