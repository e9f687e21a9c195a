"""Choose the ZeRO stage of a job, with a reason."""

from __future__ import annotations

from collections.abc import Callable

from finetune_api.cluster import Sharding
from finetune_api.problems import Problem
from finetune_trainer.plan.memory import Memory
from finetune_trainer.plan.quantities import human_bytes

HEADROOM = 0.9
"""Usable fraction of the device memory; the rest allows for fragmentation and estimation errors."""

Estimate = Callable[[int], Memory]
"""Returns the memory of one worker at a ZeRO stage."""


def choose_zero(
    spec: Sharding,
    estimate: Estimate,
    workers: int,
    device_memory: int,
    quantized_bits: int | None = None,
    *,
    casts_experts: bool = False,
) -> tuple[int, str]:
    """Return the ZeRO stage, and one sentence with its reason and the estimated memory.

    `auto` selects the lowest stage that fits in `HEADROOM` of the device memory, else the one with the least memory. It
    excludes ZeRO-3 for quantized bases, which ZeRO-3 does not partition.

    Args:
        casts_experts: whether ZeRO-0 keeps all experts in float32 and casts them in each forward pass. If so, `auto`
            selects ZeRO-0 only if no other stage fits.
    """
    if spec.zero != "auto":
        need = human_bytes(estimate(spec.zero).total)
        return spec.zero, f"ZeRO-{spec.zero} as the job says; needs {need} of {human_bytes(device_memory)} per worker"
    candidates = _candidates(spec, workers, quantized_bits)
    if casts_experts and 0 in candidates:
        zero, why = _least([*(candidates[1:] or [1]), 0], estimate, device_memory)
        return zero, f"{why}; ZeRO-0 casts the experts from float32 in each forward pass"
    if len(candidates) == 1:
        return candidates[0], _only(candidates[0], estimate, workers)
    return _least(candidates, estimate, device_memory)


def sharding_problems(spec: Sharding, quantized_bits: int | None) -> list[Problem]:
    """Return the invalid combinations of settings."""
    problems = []
    if spec.zero == 3 and quantized_bits == 8:
        message = "ZeRO-3 can't divide 8-bit weights (bitsandbytes): set sharding.zero to 2, or quantization.bits to 4"
        problems.append(Problem("sharding.zero", message))
    if spec.offload_optimizer and spec.zero == 0:
        problems.append(Problem("sharding.offloadOptimizer", "offloadOptimizer needs zero 1, 2 or 3"))
    if spec.offload_param and spec.zero != 3:
        problems.append(Problem("sharding.offloadParam", "offloadParam needs zero: 3"))
    return problems


def sharding_warnings(spec: Sharding, quantized_bits: int | None) -> list[str]:
    """Return warnings about valid combinations of settings that have no benefit."""
    if spec.zero == 3 and quantized_bits == 4:
        return ["ZeRO-3 does not divide a 4-bit base: each worker holds all of it; ZeRO-2 does it with less traffic"]
    return []


def _candidates(spec: Sharding, workers: int, quantized_bits: int | None) -> list[int]:
    least = 1 if spec.offload_optimizer else 0
    if workers == 1:
        return [least]
    return list(range(least, (2 if quantized_bits else 3) + 1))


def _only(zero: int, estimate: Estimate, workers: int) -> str:
    reason = "the optimizer's states go to the host" if zero else f"{workers} worker has nothing to share"
    return f"ZeRO-{zero}: {reason}; it needs {human_bytes(estimate(zero).total)}"


def _least(candidates: list[int], estimate: Estimate, device_memory: int) -> tuple[int, str]:
    limit = round(HEADROOM * device_memory)
    needs = {zero: estimate(zero).total for zero in candidates}
    fitting = [zero for zero in candidates if needs[zero] <= limit]
    zero = fitting[0] if fitting else min(candidates, key=needs.__getitem__)
    below = [f"ZeRO-{other} needs {human_bytes(needs[other])}" for other in candidates if other < zero]
    fits = "fits in" if fitting else "is the least that can be had, and does not fit in"
    room = f"{human_bytes(limit)} ({HEADROOM:.0%} of the device)"
    own = f"ZeRO-{zero} needs {human_bytes(needs[zero])} per worker, which {fits} {room}"
    return zero, f"{own}; {', '.join(below)}" if below else own
