from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support.plan.tiny_models import tiny
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from finetune_api.stages import SftSpec
from finetune_api.training import TrainingSpec
from finetune_trainer.plan.model_size import meta_model, model_size
from finetune_trainer.plan.steps import count_steps, flops_per_token, mfu

DATA = {"sources": [{"inline": [{"text": "x"}]}]}


def spec(**values: object) -> TrainingSpec:
    return SftSpec.model_validate({"data": DATA, "perDeviceTrainBatchSize": 1} | values)


@pytest.mark.parametrize(
    ("rows", "values"),
    [
        (7, {"perDeviceTrainBatchSize": 2, "numTrainEpochs": 2.0}),
        (10, {"perDeviceTrainBatchSize": 3, "gradientAccumulationSteps": 2, "numTrainEpochs": 2.5}),
        (5, {"perDeviceTrainBatchSize": 8, "gradientAccumulationSteps": 4, "warmupRatio": 0.5}),
        (9, {"gradientAccumulationSteps": 4, "numTrainEpochs": 0.5, "warmupSteps": 1}),
        (9, {"gradientAccumulationSteps": 2, "maxSteps": 7, "numTrainEpochs": 1.0, "warmupRatio": 0.3}),
    ],
)
def test_steps_are_the_trainers(rows: int, values: dict[str, object], tmp_path: Path) -> None:
    job = spec(**values)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=job.num_train_epochs,
        max_steps=job.max_steps or -1,
        per_device_train_batch_size=job.per_device_train_batch_size,
        gradient_accumulation_steps=job.gradient_accumulation_steps,
        warmup_steps=job.warmup_steps if job.warmup_steps is not None else job.warmup_ratio,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    data = Dataset.from_list([{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * rows)
    trainer = Trainer(AutoModelForCausalLM.from_config(tiny("llama")), args, train_dataset=data)
    trainer.train()
    steps = count_steps(job, rows)
    assert steps.total == trainer.state.global_step
    assert steps.warmup == args.get_warmup_steps(trainer.state.max_steps)


@pytest.mark.parametrize(("rows", "workers", "expected"), [(100, 3, 5), (97, 2, 7), (1, 4, 1), (16, 2, 1)])
def test_steps_with_several_workers(rows: int, workers: int, expected: int) -> None:
    """The number of batches is that of accelerate's sampler, of which each worker takes every n-th."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    job = spec(perDeviceTrainBatchSize=4, gradientAccumulationSteps=2)
    batches = BatchSampler(SequentialSampler(range(rows)), 4, drop_last=False)
    lengths = {len(BatchSamplerShard(batches, workers, rank)) for rank in range(workers)}
    assert count_steps(job, rows, workers).total == expected == -(-lengths.pop() // 2)
    assert not lengths


def test_unknown_rows_leave_unknown_steps() -> None:
    steps = count_steps(spec(), None)
    assert (steps.total, steps.per_epoch, steps.warmup) == (None, None, None)
    assert count_steps(spec(maxSteps=10, warmupRatio=0.25), None).warmup == 3


def test_flops_of_llama_8b() -> None:
    """Computed by hand as 6 N + 12 L H Q T, where N excludes the input embedding."""
    config = AutoConfig.for_model(
        "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    size = model_size(meta_model(config))
    matmul = 8_030_261_248 - 128256 * 4096
    attention = 12 * 32 * 4096 * 1024
    assert flops_per_token(size, 1024) == 6 * matmul + attention
    assert flops_per_token(size, 1024, 1000) == 4 * matmul + attention + 6000
    assert flops_per_token(size, 1024, extra_forwards=1) == pytest.approx(flops_per_token(size, 1024) * 4 / 3)


def test_forward_flops_are_torchs() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = AutoModelForCausalLM.from_config(tiny("qwen3"), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(16)[None]).logits.sum().backward()
    norms = 2 * 2 * 8 + 2 * 2 * 32 + 32  # counted as parameters, but used without a matrix product
    ours = (flops_per_token(model_size(model), 16) - 6 * norms) * 16
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.01)


def test_mfu() -> None:
    assert mfu(1e10, 5000, 1e14, workers=2) == pytest.approx(0.25)
    assert mfu(1e10, 5000, None) is None
