"""Find the model and the tokenizer that a stage starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.model import ModelSpec
from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_trainer.errors import UserError
from finetune_trainer.layout import StageLayout
from finetune_trainer.stage_graph import layouts, stage_before, stage_named
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.storage.retry import is_transient


@dataclass(frozen=True)
class ModelSource:
    """The source of weights: a local directory or hub id in `name`, or a configuration in `config`."""

    name: str | None
    config: dict[str, Any] | None
    revision: str | None
    tokenizer: str
    """Local directory or hub id of the tokenizer; empty if there is none yet."""


def local_path(path: str, base_dir: str) -> Path:
    """Resolve a path relative to the job's file or, if nothing exists there, to the current directory."""
    expanded = Path(path).expanduser()
    relative_to_job = Path(base_dir, expanded)
    return relative_to_job if relative_to_job.exists() or not expanded.exists() else expanded.absolute()


def stage_source(run: RunConfig, index: int, storage: Storage) -> ModelSource:
    """Return the model that stage `index` starts from: the result of the stage before it, or the job's model."""
    stages = run.job.spec.stages
    last = stage_before(run, index)
    if last is None:
        return _job_source(run, tokenizer="")
    before = stage_result(run, storage, layouts(run)[last])
    if stages[last].tokenizer is not None:
        return _job_source(run, tokenizer=before)
    return ModelSource(name=before, config=None, revision=None, tokenizer=before)


def base_source(run: RunConfig, storage: Storage) -> ModelSource:
    """Return the job's model before any training, with the tokenizer of all its stages."""
    first = run.job.spec.stages[0]
    trained = stage_result(run, storage, layouts(run)[0]) if first.tokenizer is not None else ""
    return _job_source(run, tokenizer=trained)


def named_source(run: RunConfig, name: str, storage: Storage) -> ModelSource:
    """Return the result of the finished stage `name` as a model source."""
    result = stage_result(run, storage, stage_named(run, name))
    return ModelSource(name=result, config=None, revision=None, tokenizer=result)


def stage_result(run: RunConfig, storage: Storage, layout: StageLayout) -> str:
    """Return a local directory with the result of a finished stage, downloaded if storage is remote."""
    cache = Path(run.cache_dir, "results", run.job.metadata.name, layout.root)
    return str(storage.download(layout.result, cache))


def resolve_model(text: str, run: RunConfig) -> str:
    """Return the local directory of a storage URI (after a download) or of an existing path; else `text`, a hub id."""
    if "://" in text:
        return str(Storage(text).download("", Path(run.cache_dir, "models", text.replace("/", "_"))))
    path = local_path(text, run.base_dir)
    return str(path) if path.exists() else text


def _job_source(run: RunConfig, tokenizer: str) -> ModelSource:
    spec = run.job.spec.model
    name = model_name(spec, run)
    own = _tokenizer_name(spec, run) or name or ""
    return ModelSource(name, spec.config, spec.revision, tokenizer or own)


def model_name(spec: ModelSpec, run: RunConfig) -> str | None:
    """Return a local directory (downloaded if `spec` has a URI) or a hub id; None where the model is built."""
    if spec.path is not None:
        return str(local_path(spec.path, run.base_dir))
    if spec.uri is not None:
        return _download(spec.uri, Path(run.cache_dir, "models", spec.uri.replace("/", "_")))
    return spec.hub


def _download(uri: str, path: Path) -> str:
    try:
        return str(Storage(uri).download("", path))
    except Exception as error:  # each storage client raises errors of other types
        if is_transient(error) or isinstance(error, UserError):
            raise
        raise UserError([Problem("model.uri", f"{uri} can't be read: {type(error).__name__}: {error}")]) from error


def _tokenizer_name(spec: ModelSpec, run: RunConfig) -> str | None:
    if spec.tokenizer is None:
        return None
    path = local_path(spec.tokenizer, run.base_dir)
    return str(path) if path.exists() else spec.tokenizer
