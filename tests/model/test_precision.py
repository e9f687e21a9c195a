"""The dtype that `model.dtype: auto` selects."""

from __future__ import annotations

import pytest
import torch

from finetune_trainer.model.precision import model_dtype


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(
    native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default torch also returns true for a T4 or V100, which emulate bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert model_dtype("auto", accelerator=True) is expected
    assert model_dtype("auto", accelerator=False) is torch.float32
    assert model_dtype("bfloat16", accelerator=True) is torch.bfloat16
