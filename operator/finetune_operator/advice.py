"""After an out-of-memory: which field to change, and to what."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from finetune_operator.classify import Ending
from finetune_operator.conditions import Reason

Json = dict[str, Any]
_QUANTITY = re.compile(r"^(\d+(?:\.\d+)?)(\D*)$")


def with_advice(ending: Ending, body: Json, status: Json) -> Ending:
    """The ending with what to change, where it was for lack of memory."""
    if ending.reason is Reason.OOM_KILLED:
        words = _host(body["spec"]) or _device(body["spec"], status)
    elif ending.reason is Reason.DEVICE_OOM:
        words = _device(body["spec"], status)
    else:
        return ending
    return dataclasses.replace(ending, message=f"{words}. {ending.message}")


def _host(spec: Json) -> str | None:
    memory = spec.get("resources", {}).get("memoryPerNode")
    match = _QUANTITY.match(memory or "")
    if match is None:
        return "Set resources.memoryPerNode, or podTemplate's memory limit, higher"
    return f"Set resources.memoryPerNode to {math.ceil(float(match[1]) * 1.5)}{match[2]} (it is {memory})"


def _device(spec: Json, status: Json) -> str:
    index, stage = _stage(spec, status)
    kind = next((name for name in stage if name != "name"), "")
    fields: Json = stage.get(kind) or {}
    where = f"stages[{index}].{kind}"
    batch = fields.get("perDeviceTrainBatchSize", 8)
    if batch > 1:
        steps = fields.get("gradientAccumulationSteps", 1) * 2
        return (
            f"Set {where}.perDeviceTrainBatchSize to {batch // 2} (it is {batch}) and "
            f"{where}.gradientAccumulationSteps to {steps}: the same batch in half the memory"
        )
    if not fields.get("gradientCheckpointing"):
        return f"Set {where}.gradientCheckpointing to true"
    if spec.get("sharding", {}).get("zero") != 3:
        return "Set sharding.zero to 3 and use more workers"
    return f"Use more nodes, or a shorter {where}.{'blockSize' if kind == 'pretrain' else 'maxLength'}"


def _stage(spec: Json, status: Json) -> tuple[int, Json]:
    """The stage that ran; without a word about it, the first that trains."""
    running = [i for i, stage in enumerate(status.get("stages") or []) if stage.get("state") == "Running"]
    trained = [i for i, stage in enumerate(spec["stages"]) if "tokenizer" not in stage]
    index = next(iter(running + trained), 0)
    return index, spec["stages"][index]
