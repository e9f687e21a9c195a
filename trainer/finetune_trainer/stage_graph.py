"""How a job's stages hang together: where each lies, which one starts from which, and whose data it reads. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune_api.data import DataSource, DataSpec
from finetune_api.runconfig import RunConfig
from finetune_api.stages import DATA_FIELDS, StageSpec
from finetune_trainer.layout import StageLayout, stage_layouts


def layouts(run: RunConfig) -> list[StageLayout]:
    """The layout of every stage, in order."""
    return stage_layouts([stage.title for stage in run.job.spec.stages])


def stage_named(run: RunConfig, name: str) -> StageLayout:
    """The layout of the stage of that name.

    Raises:
        StopIteration: there is none; the API's checks have found that.
    """
    return next(layout for layout in layouts(run) if layout.title == name)


def stage_before(run: RunConfig, index: int) -> int | None:
    """The stage whose result stage `index` starts from; None where that is the job's model."""
    stages = run.job.spec.stages
    return next((before for before in reversed(range(index)) if stages[before].spec.produces_model), None)


def directories(run: RunConfig) -> dict[str, Path]:
    """Where relative paths start and what is fetched is kept: the keyword arguments of all that read a job's data."""
    return {"base_dir": Path(run.base_dir), "cache_dir": Path(run.cache_dir)}


def place(run: RunConfig, index: int) -> str:
    """The stage's path in the job, such as `stages[1].sft`."""
    return f"stages[{index}].{run.job.spec.stages[index].kind}"


def scratch(run: RunConfig, index: int) -> Path:
    """The stage's own directory for passing files on each machine."""
    return Path(run.cache_dir, "scratch", run.job.metadata.name, str(index))


def spec_of(run: RunConfig, index: int) -> StageSpec:
    """The stage's spec, with the places of the data that it has from other stages filled in."""
    spec = run.job.spec.stages[index].spec
    changed = {name: data for name in DATA_FIELDS if (data := _placed(run, getattr(spec, name, None))) is not None}
    return spec.model_copy(update=changed) if changed else spec


def waits_for(run: RunConfig, index: int) -> Iterator[StageLayout]:
    """The stages whose data this one reads: before they are done there is none to look at."""
    for _, name in run.job.spec.stages[index].sources_from_stages():
        yield stage_named(run, name)


def _placed(run: RunConfig, data: DataSpec | None) -> DataSpec | None:
    """The data with every source of a stage's replaced by its files; None where it has no such source."""
    if data is None or all(source.stage is None for source in data.sources):
        return None
    return data.model_copy(update={"sources": [_files(run, source) for source in data.sources]})


def _files(run: RunConfig, source: DataSource) -> DataSource:
    if source.stage is None:
        return source
    where = f"{run.root.rstrip('/')}/{stage_named(run, source.stage).rows}"
    field = "uri" if "://" in run.root else "file"
    return source.model_copy(update={"stage": None, field: where})
