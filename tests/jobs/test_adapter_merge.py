"""A merged result is the original base plus the adapter, summed in float32 and rounded once.

There is no tolerance: every weight must equal that sum bit by bit in the dtype of the base, whatever dtype the stage
computed in. For QLoRA the base is the one on disk, not the dequantized weights of the training, which differ from it by
several per cent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from support.jobs.in_process import open_stage, trained
from transformers import AutoModelForCausalLM

from finetune_trainer.training.stage_result import save_result

Job = dict[str, Any]
Tensors = dict[str, torch.Tensor]
CLOSE = 1e-5
"""Tolerance for float32 logits: a separate adapter and a merged one add in different orders."""


@pytest.mark.parametrize(
    ("saved", "dtype", "bits"),
    [
        ("float32", "float32", None),
        ("float32", "float32", 4),
        ("float32", "bfloat16", 4),
        ("bfloat16", "bfloat16", None),
        ("bfloat16", "bfloat16", 8),
        ("bfloat16", "float32", None),
    ],
)
def test_merge_is_exact(
    saved: str, dtype: str, bits: int | None, base_job: Job, tiny_model: Path, tmp_path: Path
) -> None:
    base = _saved_as(getattr(torch, saved), tiny_model, tmp_path / "base")
    base_job["spec"]["model"] = {"path": str(base), "dtype": dtype}
    quantization = {"quantization": {"bits": bits}} if bits else {}
    base_job["spec"]["stages"][0]["sft"] |= {"lora": {"r": 4}, "learningRate": 1e-2, "maxSteps": 5, **quantization}
    context = open_stage(base_job, tmp_path)
    with trained(context) as trainer:
        deltas = _deltas(trainer.model)
        save_result(trainer, context, tmp_path / "result")
        original, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "result/model.safetensors")
        assert len(deltas) == 14 and all(delta.abs().max() > 1e-4 for delta in deltas.values())
        assert merged.keys() == original.keys()
        for name, weight in original.items():
            expected = (weight.float() + deltas.get(name, torch.zeros(()))).to(weight.dtype)
            assert torch.equal(merged[name], expected), name
        if bits is None and saved == dtype == "float32":
            _same_logits(trainer.model, tmp_path / "result")


def _saved_as(dtype: torch.dtype, model: Path, directory: Path) -> Path:
    from transformers import AutoTokenizer

    AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return directory


def _deltas(model: Any) -> Tensors:
    """Return the weight update of each adapter, by the weight's name on disk."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            delta = (up.detach().float() @ down.detach().float()) * layer.scaling["default"]
            found[f"{name.removeprefix('base_model.model.')}.weight"] = delta
    return found


@torch.no_grad()
def _same_logits(adapted: Any, result: Path) -> None:
    ids = torch.arange(5, 45)[None]
    merged = AutoModelForCausalLM.from_pretrained(result)
    before = adapted.get_base_model()
    logits = before(input_ids=ids, use_cache=False).logits
    assert torch.allclose(merged(input_ids=ids).logits, logits, atol=CLOSE, rtol=0)
    with adapted.disable_adapter():
        unadapted = before(input_ids=ids, use_cache=False).logits
    assert (unadapted - logits).abs().max() > 1e-2
