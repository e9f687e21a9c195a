"""Print the bytes by which loading a model raises this process's peak memory, and the bytes of its weights.

The peak is printed after loading, and again after reading all weights.

Usage: python load_peak.py MODEL WARM_UP_MODEL DTYPE
"""

from __future__ import annotations

import sys
from pathlib import Path

from merge_peak import resident


def main(model: str, warm_up: str, dtype: str) -> None:
    import torch

    from finetune_trainer.model.load import load_whole

    torch.set_num_threads(1)
    load_whole(warm_up, dtype=getattr(torch, dtype))
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current memory
    before = resident("VmRSS")
    loaded = load_whole(model, dtype=getattr(torch, dtype))
    peak = resident("VmHWM") - before
    for weight in loaded.parameters():
        weight.detach().sum()
    print(peak, resident("VmHWM") - before, sum(weight.nbytes for weight in loaded.parameters()))


if __name__ == "__main__":
    main(*sys.argv[1:])
