"""Check that the host memory of a node suffices for each stage."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_trainer.plan.quantities import human_bytes, parse_quantity
from finetune_trainer.plan.records import JobPlan, StagePlan

FIELD = "resources.memoryPerNode"
_GIB = 1 << 30


def host_problems(run: RunConfig, plan: JobPlan, machine: int | None = None) -> Iterator[Problem]:
    """Yield a problem if the stage with the largest host memory exceeds the available amount.

    Args:
        machine: bytes of host memory that the job can use on this machine; None if it runs on other machines.
    """
    stages = [stage for stage in plan.stages if stage.host is not None]
    if not stages:
        return
    most = max(stages, key=_total)
    requested = run.job.spec.resources.memory_per_node
    if requested is not None and parse_quantity(requested) < _total(most):
        least = f"set it to at least {-(-_total(most) // _GIB)}Gi"
        yield Problem(FIELD, f"got {requested}, but {_needs(most)}: {least}{_or_less(most)}")
    elif machine is not None and machine < _total(most):
        message = f"this machine has {human_bytes(machine)} free, but {_needs(most)}: use one with more memory"
        yield Problem(FIELD, f"{message}{_or_less(most)}")


def _total(stage: StagePlan) -> int:
    return 0 if stage.host is None else stage.host.total


def _needs(stage: StagePlan) -> str:
    return f"stages[{stage.index}].{stage.kind} needs {stage.host} of host memory on a node"


def _or_less(stage: StagePlan) -> str:
    """Return a hint on how to reduce the largest part."""
    assert stage.host is not None
    parts = {"loading": stage.host.loading, "saving": stage.host.saving, "merging": stage.host.merging}
    largest = max(parts, key=parts.__getitem__)
    path = f"stages[{stage.index}].{stage.kind}"
    if stage.host.offloaded > parts[largest]:
        return ", or switch off sharding.offloadOptimizer and sharding.offloadParam"
    if largest == "merging":
        return f", or set {path}.{'merge' if stage.kind == 'esft' else 'lora.merge'} to false"
    return ""
