"""The dtype in which stages multiply stacked experts, and how LoRA on them is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.esft.expert_models import build
from support.jobs.in_process import open_stage, trained
from support.jobs.tiny_rows import dialogue
from transformers import AutoTokenizer
from typer.testing import CliRunner

from finetune_cli.main import app
from finetune_trainer.model.expert_matmul import FactoredStack

Job = dict[str, Any]
ROWS = [dialogue(f"{n} plus {n}", f"makes {n + n}") for n in range(8)]
PAIRS = [{"prompt": f"{n} plus 1", "chosen": f" makes {n + 1}", "rejected": f" says {n}"} for n in range(8)]
STAGES: dict[str, Job] = {
    "full": {"sft": {}},
    "full, reference": {"dpo": {}},
    "esft": {"esft": {"sampleTokens": 200}},
    "esft, others": {"esft": {"sampleTokens": 200, "trainNonExperts": True}},
    "lora": {"sft": {"lora": {"r": 2}}},
    "lora, checkpointing": {"sft": {"lora": {"r": 2}, "gradientCheckpointing": True}},
}
Operand = tuple[torch.dtype, type]


@pytest.fixture
def operands(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Operand]]:
    """Record the dtype and type of each stack that reaches torch's `grouped_mm`, which still computes."""
    seen: list[Operand] = []
    library = torch.nn.functional.grouped_mm

    def recorded(inputs: torch.Tensor, stack: Any, **more: Any) -> torch.Tensor:
        assert inputs.dtype == stack.dtype
        seen.append((stack.dtype, type(stack)))
        return library(inputs, stack, **more)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", recorded)
    yield seen


@pytest.mark.parametrize("name", STAGES)
def test_experts_are_multiplied_in_bfloat16(
    name: str, operands: list[Operand], base_job: Job, tiny_model: Path, tmp_path: Path
) -> None:
    """ZeRO-0 has float32 master weights, for which a GPU has no fast `grouped_mm`."""
    _save_mixture(tiny_model, tmp_path / "half")
    ((kind, fields),) = STAGES[name].items()
    data = {"sources": [{"inline": PAIRS if kind == "dpo" else ROWS}]}
    stage = {kind: {"data": data, "maxLength": 64, "maxSteps": 1, "perDeviceTrainBatchSize": 2, **fields}}
    base_job["spec"] |= {"model": {"path": str(tmp_path / "half"), "dtype": "bfloat16"}, "stages": [stage]}
    with trained(open_stage(base_job, tmp_path)) as trainer:
        weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        assert {weight.dtype for weight in weights} == {torch.float32}
        assert trainer.state.global_step == 1
    assert operands and {dtype for dtype, _ in operands} == {torch.bfloat16}
    factored = {kind is FactoredStack for _, kind in operands}
    assert factored == {"lora" in name}


def _save_mixture(tokenizer: Path, directory: Path) -> None:
    """Save a tiny mixture of experts in bfloat16 with the given tokenizer."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    build("qwen3_moe", vocab_size=len(words)).to(torch.bfloat16).save_pretrained(directory)
    words.save_pretrained(directory)


def test_validate_warns_of_adapters_on_all_experts(
    base_job: Job, tiny_model: Path, tmp_path: Path, write_job: Callable[[Job], Path]
) -> None:
    _save_mixture(tiny_model, tmp_path / "half")
    base_job["spec"]["model"] = {"path": str(tmp_path / "half")}
    base_job["spec"]["stages"][0]["sft"]["lora"] = {"r": 2}
    result = CliRunner().invoke(app, ["validate", str(write_job(base_job))])
    assert result.exit_code == 0, result.output
    assert "warning: stages[0].sft.lora.targetModules adapts all experts" in result.output
