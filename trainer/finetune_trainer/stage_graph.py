"""Relations between a job's stages: their layouts, the model each starts from, and the data each reads. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune_api.data import DataSource, DataSpec
from finetune_api.runconfig import RunConfig
from finetune_api.stages import DATA_FIELDS, StageSpec
from finetune_trainer.layout import StageLayout, stage_layouts


def layouts(run: RunConfig) -> list[StageLayout]:
    """Return the layout of every stage, in order."""
    return stage_layouts([stage.title for stage in run.job.spec.stages])


def stage_named(run: RunConfig, name: str) -> StageLayout:
    """Return the layout of the stage with a name.

    Raises:
        StopIteration: there is none. The API's validation has excluded this.
    """
    return next(layout for layout in layouts(run) if layout.title == name)


def stage_before(run: RunConfig, index: int) -> int | None:
    """Return the stage whose result stage `index` starts from; None if it starts from the job's model."""
    stages = run.job.spec.stages
    return next((before for before in reversed(range(index)) if stages[before].spec.produces_model), None)


def directories(run: RunConfig) -> dict[str, Path]:
    """Return the base of relative paths and the cache, as keyword arguments of functions that read a job's data."""
    return {"base_dir": Path(run.base_dir), "cache_dir": Path(run.cache_dir)}


def place(run: RunConfig, index: int) -> str:
    """Return the path of a stage in the job, such as `stages[1].sft`."""
    return f"stages[{index}].{run.job.spec.stages[index].kind}"


def scratch(run: RunConfig, index: int) -> Path:
    """Return the local directory of a stage for temporary files."""
    return Path(run.cache_dir, "scratch", run.job.metadata.name, str(index))


def spec_of(run: RunConfig, index: int) -> StageSpec:
    """Return the spec of a stage, with data sources that name other stages replaced by their files."""
    spec = run.job.spec.stages[index].spec
    changed = {name: data for name in DATA_FIELDS if (data := _resolved(run, getattr(spec, name, None))) is not None}
    return spec.model_copy(update=changed) if changed else spec


def waits_for(run: RunConfig, index: int) -> Iterator[StageLayout]:
    """Yield the stages whose data a stage reads, which exists only once they are done."""
    for _, name in run.job.spec.stages[index].sources_from_stages():
        yield stage_named(run, name)


def _resolved(run: RunConfig, data: DataSpec | None) -> DataSpec | None:
    """Return the data with every stage source replaced by its files; None if it has no such source."""
    if data is None or all(source.stage is None for source in data.sources):
        return None
    return data.model_copy(update={"sources": [_files(run, source) for source in data.sources]})


def _files(run: RunConfig, source: DataSource) -> DataSource:
    if source.stage is None:
        return source
    path = f"{run.root.rstrip('/')}/{stage_named(run, source.stage).rows}"
    field = "uri" if "://" in run.root else "file"
    return source.model_copy(update={"stage": None, field: path})
