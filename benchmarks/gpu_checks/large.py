"""Checks of mixtures of experts, and of adapters on a model of 8 billion parameters."""

from __future__ import annotations

from gpu_checks.models import dialogues, write_rows
from gpu_checks.record import Json, Options, require
from gpu_checks.stage_runs import memory_row, require_trained, run_stage

RATE = 1e-4


def experts(options: Options) -> Json:
    """Check a small mixture of experts: full training under ZeRO-0 and 1 with equal losses, LoRA, and ESFT."""
    length, steps = (32, 2) if options.tiny else (1024, 4)
    data = write_rows(options, "experts", dialogues(options, 4, length))
    common = {"data": data, "maxLength": length, "perDeviceTrainBatchSize": 4, "maxSteps": steps, "learningRate": RATE}
    runs = {
        "moe zero0": ({"sft": common}, 0),
        "moe zero1": ({"sft": common}, 1),
        "moe lora": ({"sft": common | {"lora": {"r": 8}}}, 0),
        "esft": ({"esft": common | {"sampleTokens": 8 * length}}, 0),
    }
    values: Json = {"memory": []}
    losses: dict[str, list[float]] = {}
    for name, (stage, zero) in runs.items():
        figures = run_stage(options, name.replace(" ", "-"), "moe", stage, zero)
        values[name] = figures.values()
        values["memory"].append(memory_row(options, name, figures))
        require_trained(figures, steps, values)
        losses[name] = figures.losses
    apart = max(abs(a - b) for a, b in zip(losses["moe zero0"], losses["moe zero1"], strict=True))
    values["losses_apart"] = apart
    require(apart < (1e-3 if options.tiny else 5e-2), f"ZeRO-0 and ZeRO-1 differ by {apart:.2g}", values)
    return values


def adapters(options: Options, bits: int | None) -> Json:
    """Check LoRA on 8 billion parameters in bfloat16, 8 and 4 bits: tokens/s, and peak memory against the plan."""
    length, steps = (32, 3) if options.tiny else (2048, 5)
    data = write_rows(options, f"adapters-{bits}", dialogues(options, 8, length))
    sft = {"data": data, "maxLength": length, "perDeviceTrainBatchSize": 2, "maxSteps": steps, "learningRate": RATE}
    sft |= {"lora": {"r": 16}} | ({"quantization": {"bits": bits}} if bits else {})
    name = "lora" if bits is None else f"qlora{bits}"
    figures = run_stage(options, name, "8B", {"sft": sft})
    values = figures.values() | {"memory": [memory_row(options, f"8B {name}", figures)]}
    require_trained(figures, steps, values)
    return values
