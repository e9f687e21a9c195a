"""Opens the job's directory in storage: a new run, a resumed one, or one that sets an earlier run aside."""

from __future__ import annotations

import json
import time
from typing import Any

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_trainer.errors import UserError
from finetune_trainer.launch.same_data import renamed_data
from finetune_trainer.layout import RUN_CONFIG
from finetune_trainer.stage_graph import layouts
from finetune_trainer.storage.fencing import attempt_of
from finetune_trainer.storage.filesystem import Storage

# Fields that change how a run is logged and saved, but not what it trains. They may differ when it resumes.
_CHANGEABLE = {
    "loggingSteps",
    "evalSteps",
    "saveSteps",
    "saveTotalLimit",
    "dataloaderNumWorkers",
    "perDeviceEvalBatchSize",
    "gate",
}


def open_run(run: RunConfig, storage: Storage, *, resume: bool, fresh: bool) -> RunConfig:
    """Write the RunConfig to the job's directory, and so begin a run, resume one, or set an earlier one aside.

    Returns:
        the run with an attempt number above that of any earlier attempt, which may still be running
        (`storage.fencing`).

    Raises:
        UserError: there is an earlier run and neither `resume` nor `fresh` is set, or it had other settings.
    """
    if not storage.exists(RUN_CONFIG):
        if storage.names(""):
            raise UserError(f"{storage.root} is not empty and contains no run: choose another metadata.name")
    elif fresh:
        _set_aside(storage)
    elif not resume:
        raise UserError(f"{storage.root} contains an earlier run: --resume continues it, --fresh sets it aside")
    else:
        before = json.loads(storage.read_text(RUN_CONFIG))
        _check_same(before, run, storage)
        run = run.model_copy(update={"attempt": max(run.attempt, attempt_of(before) + 1)})
    storage.write_text(RUN_CONFIG, run.model_dump_json(by_alias=True, exclude_none=True, indent=1))
    return run


def finished(run: RunConfig, storage: Storage) -> list[bool]:
    """Return for each stage whether it is done."""
    return [storage.exists(layout.done) for layout in layouts(run)]


def _set_aside(storage: Storage) -> None:
    old = f"{storage.root}.{time.strftime('%Y%m%d-%H%M%S')}"
    storage.fs.mv(storage.root, old, recursive=True)


def _check_same(before: dict[str, Any], run: RunConfig, storage: Storage) -> None:
    """Check that the stages that have begun have the same settings as in the earlier attempt.

    Data fields that `--set` names are exempt: their rows are compared once they are prepared (`same_data`).

    Raises:
        UserError: settings differ.
    """
    now = run.to_json()
    old, new = before["job"]["spec"], now["job"]["spec"]
    begun = sum(bool(storage.names(layout.root)) for layout in layouts(run))
    problems = _differences("model", old["model"], new["model"])
    for index in range(begun):
        pair = (stages[index] if index < len(stages) else {} for stages in (old["stages"], new["stages"]))
        problems += _differences(f"stages[{index}]", *pair)
    named = renamed_data(run)
    problems = [problem for problem in problems if not any(_is_below(problem.path, field) for field in named)]
    if problems:
        raise UserError(problems)


def _is_below(path: str, field: str) -> bool:
    return path == field or path.startswith((f"{field}.", f"{field}["))


def _differences(path: str, old: Any, new: Any) -> list[Problem]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in (old | new) if name not in _CHANGEABLE]
        return [found for name in names for found in _differences(f"{path}.{name}", old.get(name), new.get(name))]
    if old == new:
        return []
    return [
        Problem(path, f"was {old!r} when this stage began and is {new!r} now: set it back, or start over with --fresh")
    ]
