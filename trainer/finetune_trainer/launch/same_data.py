"""Checks that a stage that resumes has the training rows that its checkpoint was trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from finetune_api.data import DataSpec
from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_trainer.data.data_identity import DataKey, changes
from finetune_trainer.errors import UserError
from finetune_trainer.stage_graph import place
from finetune_trainer.storage.checkpoints import Manifest

_DATA_FIELD = re.compile(r"(stages\[\d+\]\.\w+\.(?:data|evalData))(?:[.\[]|$)")
_KINDS = ("file", "directory", "uri", "hub", "stage")


@dataclass(frozen=True)
class Comparison:
    """The result of comparing a checkpoint's data with the stage's."""

    other_rows: bool
    """Whether the training rows differ, as the user has requested."""
    notes: list[str]
    """Log lines for the user."""


def renamed_data(run: RunConfig) -> set[str]:
    """Return the data fields that `--set` names, such as `stages[0].sft.data`, which a resumed run may change."""
    found = (_DATA_FIELD.match(path) for path in run.overrides)
    return {match.group(1) for match in found if match}


def compare_data(run: RunConfig, index: int, checkpoint: Manifest, now: DataKey) -> Comparison:
    """Compare the data of a checkpoint with the data of stage `index`.

    Raises:
        UserError: the training rows differ, and no `--set` names the stage's data field.
    """
    before, field = checkpoint.data, f"{place(run, index)}.data"
    if before is None:
        return Comparison(False, [f"the checkpoint of step {checkpoint.step} does not say what it was trained on"])
    notes = [] if before.get("eval") == now.eval else [_other_eval(checkpoint)]
    found = changes(before, now)
    if not found:
        return Comparison(False, notes)
    what = f"{' and '.join(found)} than at step {checkpoint.step}, from which this stage resumes"
    if field not in renamed_data(run) or run.job.spec.stages[index].online is not None:
        raise UserError([Problem(field, f"{what}: {_remedy(run, index, field)}")])
    return Comparison(True, [*notes, f"{what}: training continues with them, because --set names {field}"])


def _other_eval(checkpoint: Manifest) -> str:
    return f"other held-out rows than at step {checkpoint.step}: losses before and after it are not comparable"


def _remedy(run: RunConfig, index: int, field: str) -> str:
    spec = run.job.spec.stages[index].spec
    restore = "restore the data, or start over with --fresh"
    if run.job.spec.stages[index].online is not None:
        return f"{restore}; the completions of finished rounds belong to the earlier prompts"
    assert spec.data is not None, "a stage without data has no rows that could differ"
    return f"{restore}; to continue with other rows, name the data, such as --set {field}.{_example(spec.data)}"


def _example(data: DataSpec) -> str:
    source = data.sources[0]
    values = ((kind, getattr(source, kind)) for kind in _KINDS)
    return next((f"sources[0].{kind}={value}" for kind, value in values if value is not None), f"seed={data.seed}")
