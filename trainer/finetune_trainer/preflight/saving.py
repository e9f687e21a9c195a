"""Estimate size and duration of checkpoints, and check that disks have room for them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_trainer.plan.quantities import human_bytes, parse_quantity
from finetune_trainer.plan.records import JobPlan
from finetune_trainer.plan.saving import Saving, saving
from finetune_trainer.stage_graph import layouts
from finetune_trainer.storage.filesystem import Storage

PROBE_BYTES = 32 << 20
WORTH_BYTES = 1 << 30
"""Any store saves smaller checkpoints in time, so its speed is not measured."""
_PROBE = ".write-probe-"


def job_saving(run: RunConfig, plan: JobPlan, bytes_per_second: float | None = None) -> Saving | None:
    """Return size and duration of the job's largest checkpoint; None if no stage saves any."""
    resources = run.job.spec.resources
    nodes = resources.min_nodes or resources.nodes or 1
    return saving([(stage.checkpoint, stage.zero) for stage in plan.stages], nodes, bytes_per_second)


def measured_speed(storage: Storage, plan: JobPlan) -> float | None:
    """Return the write speed of the job's storage in bytes per second, measured with a file of 32 MiB.

    None if the job's checkpoints are small, or if the write fails, which other checks report.
    """
    if max((stage.checkpoint for stage in plan.stages), default=0) < WORTH_BYTES:
        return None
    name, content = f"{_PROBE}{uuid4().hex[:8]}", os.urandom(PROBE_BYTES)
    began = time.monotonic()
    try:
        storage.write_bytes(name, content)
        seconds = time.monotonic() - began
        storage.delete(name)
    except OSError:
        return None
    return PROBE_BYTES / max(seconds, 1e-6)


def room_problems(run: RunConfig, plan: JobPlan, *, on_node: bool) -> Iterator[Problem]:
    """Yield a problem if a disk is too small for one checkpoint of the unfinished stages.

    For a remote store, the cache is checked: each node writes its part there before the upload.

    Args:
        on_node: whether this process runs on a node of the job. A preflight pod does not, and has its own cache.
    """
    storage = Storage(run.root)
    places = layouts(run)
    left = [stage for stage in plan.stages if stage.checkpoint and not storage.exists(places[stage.index].done)]
    found, local = job_saving(run, replace(plan, stages=tuple(left))), storage.local("")
    if found is None:
        return
    if local is None:
        yield from _cache_problems(run, found, on_node or run.job.spec.kubernetes.model_cache_claim is not None)
    elif (free := _free(local)) < found.size:
        field = "storage.path" if run.job.spec.storage.path is not None else "storage.uri"
        message = f"{human_bytes(free)} are free in {local}, but a checkpoint takes {human_bytes(found.size)}"
        yield Problem(field, f"{message}: free space, or name a larger disk or an object store")


def _cache_problems(run: RunConfig, found: Saving, sees_cache: bool) -> Iterator[Problem]:
    kubernetes, cache = run.job.spec.kubernetes, Path(run.cache_dir)
    limit, needs = kubernetes.cache_size_limit, f"a node's part of a checkpoint takes {human_bytes(found.node)}"
    if limit is not None and parse_quantity(limit) < found.node:
        message = f"got {limit}, but {needs} before it is uploaded: set it to that and the size of model and data"
        yield Problem("kubernetes.cacheSizeLimit", message)
    elif sees_cache and (free := _free(cache)) < found.node:
        field = "modelCacheClaim" if kubernetes.model_cache_claim is not None else "cacheSizeLimit"
        yield Problem(
            f"kubernetes.{field}",
            f"{human_bytes(free)} are free in the cache {cache}, but {needs} before it is uploaded: set "
            "cacheSizeLimit, so that nodes with room are chosen, or a larger modelCacheClaim; on one machine "
            "FINETUNE_CACHE",
        )


def _free(place: Path) -> int:
    """Return the free bytes on the disk of a directory that need not exist yet."""
    there = next(path for path in (place, *place.parents) if path.exists())
    return shutil.disk_usage(there).free
