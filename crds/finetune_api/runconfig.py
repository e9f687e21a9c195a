"""`RunConfig`: one attempt of a job, resolved and immutable, from whoever starts it to the trainer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.job import FineTuneJob


class RunConfig(ApiModel):
    """All that a trainer needs to know; a running attempt never sees a later change of its job."""

    job: FineTuneJob
    """The job, `--set` overrides applied and defaults written out."""
    root: Annotated[str, Field(min_length=1)]
    """The job's own directory in storage: an absolute path or a URI."""
    base_dir: Annotated[str, Field(min_length=1)]
    """Directory that relative paths of models and data start from."""
    work_dir: Annotated[str, Field(min_length=1)] | None = None
    """Directory that they start from where `base_dir` has no such file. Default: the process's current directory."""
    cache_dir: Annotated[str, Field(min_length=1)]
    """Local directory for prepared data and downloads; it may be shared and may be deleted at any time."""
    overrides: list[str] = Field(default_factory=list)
    """Fields that `--set` names, such as `stages[0].sft.data.limit`: a resumed run may have other data there."""
    attempt: Annotated[int, Field(ge=1)] = 1
    """Which attempt this is, from 1; the trainer counts on where its directory tells of a later one."""
