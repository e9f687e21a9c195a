"""Checks of dense models in training: against plain TRL, memory between stages, packing, and each kind of stage."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from gpu_checks.models import dialogues, make_tokenizer, pairs, saved_model, text_of, write_rows
from gpu_checks.record import Json, Options, require
from gpu_checks.stage_runs import Figures, clocked, join_group, memory_row, require_trained, run_stage

RATE = 1e-4


def sft_against_trl(options: Options) -> Json:
    """Compare full fine-tuning by our stage and by plain `trl.SFTTrainer`, twice each: equal losses, tokens/s, MFU."""
    steps, rows, length = (3, 4, 32) if options.tiny else (8, 4, 2048)
    data = dialogues(options, rows, length)  # every step uses all of them, so their order does not matter
    stage = {"sft": {"data": write_rows(options, "against", data), "maxLength": length, "learningRate": RATE,
                     "perDeviceTrainBatchSize": rows, "maxSteps": steps, "warmupSteps": 0}}  # fmt: skip
    ours: list[Figures] = []
    plain: list[tuple[list[float], list[float]]] = []
    for turn in range(2):
        ours.append(run_stage(options, f"against-{turn}", "1.7B", stage))
        plain.append(_plain_sft(options, data, length, steps))
    values: Json = {"ours": [one.values() for one in ours], "memory": [memory_row(options, "sft 1.7B", ours[0])]}
    values["plain_losses"] = plain[0][0]
    values["plain_tokens_per_second"] = [ours[0].tokens_per_step / min(seconds) for _, seconds in plain]
    values["step_ratio"] = min(min(one.seconds) for one in ours) / min(min(seconds) for _, seconds in plain)
    for one in ours:
        require_trained(one, steps, values)
    apart = max(abs(a - b) for a, b in zip(ours[0].losses, plain[0][0], strict=True))
    values["losses_apart"] = apart
    require(apart < (1e-4 if options.tiny else 2e-2), f"the losses differ by {apart:.2g}", values)
    require(options.tiny or values["step_ratio"] < 1.1, "our steps take more than 1.1 of plain TRL's", values)
    return values


def _plain_sft(options: Options, rows: list[Json], length: int, steps: int) -> tuple[list[float], list[float]]:
    """Return the losses and seconds of plain TRL's steps with the same settings: float32 weights, bfloat16 autocast."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from finetune_trainer.training.reset_state import release, reset_stage_state

    join_group(options)
    model = AutoModelForCausalLM.from_pretrained(saved_model(options, "1.7B"), dtype=torch.float32)
    args = trl.SFTConfig(
        output_dir=str(options.work / "plain"), max_length=length, max_steps=steps, learning_rate=RATE,
        per_device_train_batch_size=len(rows), bf16=options.accelerator, use_cpu=options.tiny, warmup_steps=0,
        lr_scheduler_type="cosine", weight_decay=0.0, gradient_checkpointing=False, assistant_only_loss=True,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer: Any = trl.SFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer(options)
    )
    times = clocked(trainer)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    release(trainer)
    del trainer, model
    reset_stage_state()
    return losses, [after - before for before, after in pairwise(times)]


def memory_between_stages(options: Options) -> Json:
    """Check that a finished stage leaves nothing on the device under ZeRO-0 to 3, with full training and adapters."""
    length, steps = (32, 2) if options.tiny else (1024, 3)
    common = {"data": write_rows(options, "zero", dialogues(options, 4, length)), "maxLength": length,
              "perDeviceTrainBatchSize": 2, "maxSteps": steps, "learningRate": RATE}  # fmt: skip
    values: Json = {"left_mib": {}, "memory": []}
    for zero in range(4):
        for kind, more in (("full", {}), ("lora", {"lora": {"r": 8}})):
            name = f"zero{zero}-{kind}"
            figures = run_stage(options, name, "0.6B", {"sft": common | more}, zero)
            values["left_mib"][name] = figures.left / 2**20
            values["memory"].append(memory_row(options, f"0.6B {name}", figures))
            require_trained(figures, steps, values)
            allowed = max(figures.planned // 50, 0 if options.tiny else 16 << 20)
            require(figures.left <= allowed, f"{name} leaves {figures.left:,} bytes, allowed {allowed:,}", values)
    return values


def packing(options: Options) -> Json:
    """Check packed rows of growing lengths: tokens/s, and peak memory against the plan."""
    values: Json = {"memory": []}
    for length in (32, 64) if options.tiny else (2048, 4096, 8192):
        data = write_rows(options, f"packing-{length}", dialogues(options, 48, length // 3))
        stage = {"sft": {"data": data, "maxLength": length, "packing": True, "maxSteps": 4, "lora": {"r": 8},
                         "perDeviceTrainBatchSize": 2, "learningRate": RATE}}  # fmt: skip
        figures = run_stage(options, f"packing-{length}", "1.7B", stage)
        values[str(length)] = figures.values()
        values["memory"].append(memory_row(options, f"packed {length}", figures))
        require_trained(figures, 4, values)
    return values


def dpo_references(options: Options) -> Json:
    """Check DPO with its three references: the first loss is ln 2, and all three give the same losses."""
    steps, length = 3, 32 if options.tiny else 512
    data = write_rows(options, "pairs", pairs(options, 4, length))
    values: Json = {"losses": {}, "memory": []}
    for reference in ("adapterDisabled", "model", "precomputed"):
        stage = {"dpo": {"data": data, "maxLength": 4 * length, "maxSteps": steps, "reference": reference,
                         "lora": {"r": 8}, "perDeviceTrainBatchSize": 2, "learningRate": RATE}}  # fmt: skip
        figures = run_stage(options, f"dpo-{reference.lower()}", "0.6B", stage)
        values["losses"][reference] = figures.losses
        values["memory"].append(memory_row(options, f"dpo {reference}", figures))
        require_trained(figures, steps, values)
    first, *others = values["losses"].values()
    apart = max(abs(a - b) for other in others for a, b in zip(first, other, strict=True))
    close = 1e-4 if options.tiny else 2e-2
    require(apart < close, f"the references' losses differ by {apart:.2g}", values)
    require(abs(first[0] - math.log(2)) < close, f"the first loss is {first[0]:.4f}, expected ln 2", values)
    return values


def other_stages(options: Options) -> Json:
    """Train three steps each of a reward model, RLOO, GRPO and masked pretraining."""
    length = 32 if options.tiny else 512
    common = {"maxSteps": 3, "perDeviceTrainBatchSize": 2, "learningRate": RATE}
    prompts = write_rows(options, "prompts", [{"prompt": f"{number} plus {number}"} for number in range(8)])
    rlhf = {"data": prompts, "rewards": [{"regex": "makes"}], "numGenerations": 4, "lora": {"r": 8},
            "generation": {"maxNewTokens": 4 if options.tiny else 32}}  # fmt: skip
    masked = {"data": write_rows(options, "texts", _texts(options, length)), "blockSize": length, "objective": "masked"}
    stages: dict[str, Json] = {
        "reward": {"reward": common | {"data": write_rows(options, "ranked", pairs(options, 8, length))}},
        "rloo": {"rlhf": common | rlhf},
        "grpo": {"rlhf": common | rlhf | {"algorithm": "grpo"}},
        "masked": {"pretrain": common | masked},
    }
    values: Json = {"memory": []}
    for name, stage in stages.items():
        model = _masked_model(options) if name == "masked" else None
        figures = run_stage(options, name, "0.6B", stage, model=model)
        values[name] = figures.values()
        values["memory"].append(memory_row(options, name, figures))
        require_trained(figures, 3, values)
    return values


def _texts(options: Options, length: int) -> list[Json]:
    return [{"text": text_of(options, 2 * length, number)} for number in range(8)]


def _masked_model(options: Options) -> Json:
    """Save a BERT from scratch; the size of BERT-base on a GPU."""
    width = 32 if options.tiny else 768
    layers, heads = (2, 2) if options.tiny else (12, 12)
    config = {"model_type": "bert", "hidden_size": width, "intermediate_size": 4 * width}
    config |= {"max_position_embeddings": 512, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"config": config, "tokenizer": str(saved_model(options, "0.6B"))}
