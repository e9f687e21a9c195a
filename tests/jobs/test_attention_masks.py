"""The attention masks during whole stages: none for packed rows and for rows padded on the right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs.in_process import open_stage, trained
from support.jobs.tiny_rows import dialogue
from torch import Tensor, nn

Job = dict[str, Any]
ROWS = [dialogue(f"{n} plus {n}", " ".join(str(m) for m in range(1 + (n * n) % 11))) for n in range(9)]
PAIRS = [
    {"prompt": f"{n} plus 1", "chosen": " makes" * (1 + n % 3), "rejected": " says" * (1 + n % 4)} for n in range(9)
]
STAGES: dict[str, Callable[[Job], Job]] = {
    "packed": lambda common: {"sft": common | {"packing": True, "data": {"sources": [{"inline": ROWS}]}}},
    "padded": lambda common: {"sft": common | {"data": {"sources": [{"inline": ROWS}]}}},
    "pairs": lambda common: {"dpo": common | {"data": {"sources": [{"inline": PAIRS}]}, "reference": "model"}},
    "rewards": lambda common: {"reward": common | {"data": {"sources": [{"inline": PAIRS}]}}},
}


@pytest.mark.parametrize("kind", STAGES)
def test_no_mask(kind: str, base_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of torch's attention has a mask in training, in the reference's pass and on held-out rows."""
    masks: list[bool] = []
    torchs = nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled() or kind != "packed":  # the preflight tries single rows with masks
            masks.append(kwargs.get("attn_mask") is not None)
        return torchs(*args, **kwargs)

    stage = STAGES[kind]({"maxLength": 64, "maxSteps": 2, "perDeviceTrainBatchSize": 3})
    base_job["spec"]["model"]["attnImplementation"] = "sdpa"
    base_job["spec"]["stages"] = [stage]
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    with trained(open_stage(base_job, tmp_path)) as trainer:
        assert trainer.state.global_step == 2
    assert len(masks) >= 4 and not any(masks)
