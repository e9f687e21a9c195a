"""Advice for a stage that does not fit in memory: changes of settings, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from finetune_api.stages import TrainedSpec
from finetune_trainer.plan.memory import Workload, estimate
from finetune_trainer.plan.model_size import AdapterSize, ModelSize
from finetune_trainer.plan.quantities import human_bytes

Change = Callable[[Workload], tuple[str, Workload] | None]
"""Returns the text of a change and the changed workload, or None if the change does not apply."""


def advise(
    size: ModelSize,
    load: Workload,
    spec: TrainedSpec,
    path: str,
    limit: int,
    adapter: Callable[[], AdapterSize],
    lean: Callable[[], tuple[AdapterSize, list[str]]],
) -> list[str]:
    """Return the cheapest single change after which the workload fits in `limit` bytes, else a combination of changes.

    Args:
        path: the stage's path in the job, such as `stages[1].sft`.
        adapter: returns the size of a default adapter; called only if needed.
        lean: returns the size of the stage's adapter without stacked experts, and its target modules; called if needed.
    """
    changes = list(_changes(size, spec, path, limit, adapter, lean))
    for change in changes:
        changed = change(load)
        if changed is not None and estimate(size, changed[1]).total <= limit:
            return [f"{changed[0]} ({human_bytes(estimate(size, changed[1]).total)}, fits)"]
    return _together(size, load, changes, limit)


def _together(size: ModelSize, load: Workload, changes: list[Change], limit: int) -> list[str]:
    texts: list[str] = []
    for change in changes:
        changed = change(load)
        if changed is None or estimate(size, changed[1]).total >= estimate(size, load).total:
            continue
        text, load = changed
        total = estimate(size, load).total
        texts.append(f"{'and ' if texts else ''}{text} ({human_bytes(total)}{', fits' if total <= limit else ''})")
        if total <= limit:
            return texts
    return [*texts, "that is not enough: use devices with more memory, more of them, or a smaller model"]


def _changes(
    size: ModelSize,
    spec: TrainedSpec,
    path: str,
    limit: int,
    adapter: Callable[[], AdapterSize],
    lean: Callable[[], tuple[AdapterSize, list[str]]],
) -> Iterator[Change]:
    yield lambda load: _checkpointing(load, path)
    yield lambda load: _smaller_batch(size, load, spec, path, limit)
    yield lambda load: _more_sharding(size, load, limit)
    if hasattr(spec, "lora"):
        yield lambda load: _lora(load, path, adapter)
        yield lambda load: _no_experts(load, path, lean)
        yield lambda load: _quantization(load, path)


def _checkpointing(load: Workload, path: str) -> tuple[str, Workload] | None:
    if load.checkpointing:
        return None
    return f"set {path}.gradientCheckpointing to true", replace(load, checkpointing=True)


def _smaller_batch(
    size: ModelSize, load: Workload, spec: TrainedSpec, path: str, limit: int
) -> tuple[str, Workload] | None:
    """Reduce the batch size to its largest divisor that fits, else to 1; keep the global batch size."""
    rows, pairs = spec.per_device_train_batch_size, load.batch // spec.per_device_train_batch_size
    divisors = [count for count in range(rows - 1, 0, -1) if rows % count == 0]
    loads = {
        count: replace(
            load, batch=count * pairs, drawn=load.drawn * count // rows, accumulation=load.accumulation * rows // count
        )
        for count in divisors
    }
    fitting = [count for count in divisors if estimate(size, loads[count]).total <= limit]
    count = next(iter([*fitting, *divisors[-1:]]), None)
    if count is None:
        return None
    accumulation = spec.gradient_accumulation_steps * rows // count
    text = f"set {path}.perDeviceTrainBatchSize to {count} and gradientAccumulationSteps to {accumulation}"
    return text, loads[count]


def _more_sharding(size: ModelSize, load: Workload, limit: int) -> tuple[str, Workload] | None:
    """Raise the ZeRO stage to the lowest one that fits, else to the one with the least memory."""
    stages = range(load.zero + 1, (2 if load.quantized_bits else 3) + 1) if load.workers > 1 else range(0)
    loads = [replace(load, zero=stage) for stage in stages]
    if not loads:
        return None
    fitting = [other for other in loads if estimate(size, other).total <= limit]
    best = fitting[0] if fitting else min(loads, key=lambda other: estimate(size, other).total)
    return f"set sharding.zero to {best.zero}", best


def _lora(load: Workload, path: str, adapter: Callable[[], AdapterSize]) -> tuple[str, Workload] | None:
    if load.adapter is not None:
        return None
    return f"set {path}.lora to {{}} (adapters of rank 16)", replace(load, adapter=adapter(), reference=False)


def _no_experts(
    load: Workload, path: str, lean: Callable[[], tuple[AdapterSize, list[str]]]
) -> tuple[str, Workload] | None:
    """Restrict the adapters to linear layers, without stacked experts."""
    if load.adapter is None or not load.adapter.stack_weights:
        return None
    adapter, names = lean()
    return f"set {path}.lora.targetModules to [{', '.join(names)}]", replace(load, adapter=adapter)


def _quantization(load: Workload, path: str) -> tuple[str, Workload] | None:
    if load.adapter is None or load.quantized_bits is not None or load.zero == 3:
        return None
    return f"set {path}.quantization to {{bits: 4}}", replace(load, quantized_bits=4)
