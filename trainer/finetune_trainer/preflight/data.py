"""Check the data and the storage of a job, and describe how its rows are read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from finetune_api.data import DataSpec
from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.stages import DATA_FIELDS, PromptSpec, StageSpec
from finetune_trainer.data import inspect, reading_notes
from finetune_trainer.errors import UserError
from finetune_trainer.evaluation.harness_tasks import task_problems
from finetune_trainer.evaluation.query_execution import open_database
from finetune_trainer.layout import RUN_CONFIG
from finetune_trainer.model.source import local_path
from finetune_trainer.preflight.settings import is_masked
from finetune_trainer.stage_graph import place, stage_before
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.storage.retry import is_transient


def data_problems(run: RunConfig) -> Iterator[Problem]:
    """Yield all faults of storage and data. An unavailable remote store is not a fault: the job waits for it."""
    yield from _storage(run)
    yield from _data(run)
    yield from _rewards(run)
    yield from _evaluations(run)
    yield from _syntheses(run)


def _storage(run: RunConfig) -> Iterator[Problem]:
    """Check that the nearest existing directory is writable, or that a remote store does not reject access."""
    if "://" in run.root:
        yield from _refusal(run)
        return
    nearest = next(parent for parent in Path(run.root).parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return
    except OSError as error:
        yield Problem("storage.path", f"can't write to {nearest} ({error.strerror}): choose another directory")


def _refusal(run: RunConfig) -> Iterator[Problem]:
    try:
        Storage(run.root, retry_seconds=0).exists(RUN_CONFIG)
    except Exception as error:  # each store has its own error classes
        if not is_transient(error):
            yield Problem("storage.uri", f"can't reach {run.root}: {type(error).__name__}: {error}")


def _data(run: RunConfig) -> Iterator[Problem]:
    for index, stage in enumerate(run.job.spec.stages):
        referenced = stage.evaluate is not None and stage.evaluate.generates
        for field, data in _sources(stage.spec):
            where = f"{place(run, index)}.{field}"
            yield from inspect(data, stage.spec.row_kind, where, Path(run.base_dir), referenced=referenced)


def _sources(spec: StageSpec) -> Iterator[tuple[str, DataSpec]]:
    """Yield the data of the stage by field name, except data that another stage generates."""
    for field in DATA_FIELDS:
        data = getattr(spec, field, None)
        if data is not None and all(source.stage is None for source in data.sources):
            yield str(type(spec).model_fields[field].alias), data


def data_notes(run: RunConfig) -> Iterator[str]:
    """Yield a line for each source whose row format was detected."""
    for index, stage in enumerate(run.job.spec.stages):
        for field, data in _sources(stage.spec):
            yield from reading_notes(data, stage.spec.row_kind, f"{place(run, index)}.{field}", Path(run.base_dir))


def _evaluations(run: RunConfig) -> Iterator[Problem]:
    """Yield faults of evaluations: unknown tasks, databases that cannot be created, models that cannot be compared."""
    masked = {stage.title for stage in run.job.spec.stages if is_masked(stage)}
    for index, stage in enumerate(run.job.spec.stages):
        spec, where = stage.evaluate, place(run, index)
        if spec is None:
            continue
        yield from task_problems(spec, where, run.base_dir)
        for at, name in enumerate(spec.compare_with):
            if name in masked:
                yield Problem(f"{where}.compareWith[{at}]", f"{name!r} fills masks: it has nothing to compare")
        try:
            if spec.database is not None:
                open_database(spec.database, f"{where}.database", Path(run.base_dir), Path(run.cache_dir)).close()
        except UserError as error:
            yield from error.problems


def _rewards(run: RunConfig) -> Iterator[Problem]:
    for index, stage in enumerate(run.job.spec.stages):
        if isinstance(stage.spec, PromptSpec):
            from finetune_trainer.rewards.reward_checks import reward_problems  # an HTTP client: few jobs need one

            yield from reward_problems(stage.spec, run, place(run, index))


def _syntheses(run: RunConfig) -> Iterator[Problem]:
    """Yield faults of synthesis: unavailable teachers, databases and evaluation data that cannot be read."""
    stages = run.job.spec.stages
    for index, stage in enumerate(stages):
        spec, where = stage.synthesize, place(run, index)
        if spec is None:
            continue
        from finetune_trainer.synthesis.checks import synthesis_problems  # an HTTP client: few jobs need one

        yield from synthesis_problems(spec, where, Path(run.base_dir))
        model, at = spec.teacher.model, f"{where}.teacher.model"
        if model is None:
            continue
        if model.path is not None and not local_path(model.path, run.base_dir).is_dir():
            yield Problem(f"{at}.path", f"no such directory: {model.path}")
        named = next((one for one in stages if model.stage is not None and one.title == model.stage), None)
        last = stage_before(run, index)
        before = named or (None if last is None else stages[last])
        current = not any((model.hub, model.path, model.uri, model.stage))
        if current and run.job.spec.model.config is not None and (before is None or before.tokenizer is not None):
            yield Problem(at, "is the job's model, which is built from scratch and not trained yet: it knows nothing")
        if before is not None and is_masked(before) and (current or named is not None):
            yield Problem(at, f"{before.title!r} fills masks: a teacher continues text")
