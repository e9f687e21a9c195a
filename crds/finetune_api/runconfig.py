"""`RunConfig`: the resolved, immutable configuration of one attempt.

The operator or the CLI writes it, and the trainer reads it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.job import FineTuneJob


class RunConfig(ApiModel):
    """Configuration of one attempt. Later changes of the job do not affect a running attempt."""

    job: FineTuneJob
    """The job, with `--set` overrides applied and defaults filled in."""
    root: Annotated[str, Field(min_length=1)]
    """Directory of the job in storage: an absolute path or a URI."""
    base_dir: Annotated[str, Field(min_length=1)]
    """Directory that relative paths of models and data are resolved against."""
    work_dir: Annotated[str, Field(min_length=1)] | None = None
    """Second directory to resolve them against, if `base_dir` has no such file. Default: the current directory."""
    cache_dir: Annotated[str, Field(min_length=1)]
    """Local directory for prepared data and downloads. It may be shared, and may be deleted at any time."""
    overrides: list[str] = Field(default_factory=list)
    """Fields that `--set` overrides, such as `stages[0].sft.data.limit`: a resumed run may use other data for them."""
    attempt: Annotated[int, Field(ge=1)] = 1
    """Number of the attempt, from 1. If the job's directory records a later attempt, the trainer counts from that
    one."""
