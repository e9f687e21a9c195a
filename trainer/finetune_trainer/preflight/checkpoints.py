"""Check the saved models that a job loads, from their configurations and the headers of their weight files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from finetune_api.declaration import Task
from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.stages import PromptSpec, SynthesizeSpec
from finetune_api.training import TrainingSpec
from finetune_trainer.errors import UserError
from finetune_trainer.model.checkpoint_matching import match_checkpoint
from finetune_trainer.model.config import load_config, load_tokenizer, read_config
from finetune_trainer.model.dry_save import saving_faults
from finetune_trainer.model.generation import read_generation_config
from finetune_trainer.model.load import JobModel
from finetune_trainer.model.load_notes import loading_notes
from finetune_trainer.model.prequantized import environment_fault, quantization_method, training_fault
from finetune_trainer.model.saved_model import is_reward_model, root_of
from finetune_trainer.model.source import ModelSource, base_source, local_path
from finetune_trainer.model.task import as_reward, auto_class
from finetune_trainer.model.vocabulary import added_rows, vocabulary_fault
from finetune_trainer.model.weights import is_local, weight_faults
from finetune_trainer.stage_graph import place, stage_before
from finetune_trainer.storage.filesystem import Storage


def checkpoint_problems(run: RunConfig) -> Iterator[Problem]:
    """Yield the faults of the job's model, teachers and reward models that are available on this machine."""
    yield from _base(run)
    for index, stage in enumerate(run.job.spec.stages):
        if stage.synthesize is not None:
            yield from _teacher(run, index, stage.synthesize)
        if isinstance(stage.spec, PromptSpec):
            yield from _reward_models(run, index, stage.spec)


def checkpoint_notes(run: RunConfig) -> list[str]:
    """Return notes on the changes that loading makes to the job's model. The model must have no faults."""
    source, tasks = _source(run), _tasks(run)
    if source is None or not is_local(root_of(str(source.name)), source.revision):
        return []
    job = JobModel(run.job.spec.model, load_tokenizer(source), run.cache_dir)
    return list(dict.fromkeys(note for task in tasks for note in loading_notes(source, job, task)))


def _source(run: RunConfig) -> ModelSource | None:
    """Return the source of the job's model and tokenizer, or None if the job creates one of them."""
    if run.job.spec.model.config is not None:
        return None
    return base_source(run, Storage(run.root))


def _tasks(run: RunConfig) -> list[Task]:
    """Return the distinct tasks of the stages that start from the job's model."""
    starting = [stage for index, stage in enumerate(run.job.spec.stages) if stage_before(run, index) is None]
    return list(dict.fromkeys(stage.spec.task for stage in starting))


def _base(run: RunConfig) -> Iterator[Problem]:
    source, spec = _source(run), run.job.spec.model
    if source is None:
        return
    where = "model." + next(field for field in ("path", "hub", "uri") if getattr(spec, field) is not None)
    try:
        tokenizer = load_tokenizer(source)
        config = load_config(source, tokenizer)
        name = root_of(str(source.name))
        yield from _quantized(run, config, where)
        if fault := vocabulary_fault(spec, config, tokenizer):
            yield Problem("model.resizeEmbeddings", fault)
        if quantization_method(config) is None and is_local(name, source.revision):
            for task in _tasks(run):
                yield from _weights(name, config, task, where, source.revision, new_head=task == "reward")
        yield from _saving(name, config, tokenizer, source.revision, where)
        if added_rows(spec, config, tokenizer) is not None:
            yield from _added_rows_kept(run)
    except UserError as error:
        yield from error.problems


def _quantized(run: RunConfig, config: PretrainedConfig, where: str) -> Iterator[Problem]:
    """Yield why stages cannot start from quantized weights."""
    method, spec = quantization_method(config), run.job.spec.model
    if method is None:
        return
    stages = run.job.spec.stages
    starting = [index for index in range(len(stages)) if stage_before(run, index) is None]
    trains = any(isinstance(stages[index].spec, TrainingSpec) for index in starting)
    if trains and (fault := training_fault(config, spec.dequantize)):
        yield Problem(where, fault)
        return
    for index in starting:
        found = stages[index].evaluate
        if found is not None and found.quantization and not spec.dequantize:
            yield Problem(f"{place(run, index)}.quantization", f"the model's weights are quantized already ({method})")
    if not spec.dequantize and (fault := environment_fault(config)):
        yield Problem(where, fault)


def _weights(
    name: str, config: PretrainedConfig, task: Task, where: str, revision: str | None = None, *, new_head: bool = False
) -> Iterator[Problem]:
    if Path(name).is_dir() and (faults := list(weight_faults(Path(name)))):
        yield from (Problem(where, fault) for fault in faults)
        return
    config = as_reward(config, None) if task == "reward" else config
    try:
        match = match_checkpoint(name, config, auto_class(task), revision, new_head)
    except (ValueError, OSError, SafetensorError) as error:
        yield Problem(where, str(error).strip().splitlines()[0])
        return
    yield from (Problem(where, problem) for problem in match.problems())


def _saving(
    name: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, revision: str | None, where: str
) -> Iterator[Problem]:
    try:
        generation = read_generation_config(name, config, revision)
    except UserError as error:
        yield from (Problem(where, problem.message) for problem in error.problems)
        return
    yield from (Problem(where, fault) for fault in saving_faults(config, generation, tokenizer))


def _added_rows_kept(run: RunConfig) -> Iterator[Problem]:
    """Refuse expert adapters with added embedding rows: the adapter contains no embeddings, so they would be lost."""
    for index, stage in enumerate(run.job.spec.stages):
        if stage.esft is not None and not stage.esft.merge and stage_before(run, index) is None:
            message = "the result would lack the embedding rows that model.resizeEmbeddings adds: set true"
            yield Problem(f"{place(run, index)}.merge", message)


def _teacher(run: RunConfig, index: int, spec: SynthesizeSpec) -> Iterator[Problem]:
    teacher, where = spec.teacher.model, f"{place(run, index)}.teacher.model"
    if teacher is None or (teacher.path is None and teacher.hub is None):
        return
    name = teacher.hub or str(local_path(str(teacher.path), run.base_dir))
    where = f"{where}.{'hub' if teacher.hub else 'path'}"
    if not is_local(name, teacher.revision):
        return
    try:
        config = read_config(root_of(name), teacher.revision, where)
        load_tokenizer(ModelSource(name, None, teacher.revision, tokenizer=name), where)
        if quantization_method(config) is None:
            yield from _weights(root_of(name), config, "causal", where, teacher.revision)
        elif fault := environment_fault(config):
            yield Problem(where, fault)
    except UserError as error:
        yield from (Problem(problem.path or where, problem.message) for problem in error.problems)


def _reward_models(run: RunConfig, index: int, spec: PromptSpec) -> Iterator[Problem]:
    """Yield the faults of reward models in local directories. Others are checked when they are downloaded."""
    where = place(run, index)
    named = {f"{where}.{at}.model": scorer.model for at, scorer in spec.scorers.items()}
    for field, text in named.items():
        path = None if text is None or "://" in text else local_path(text, run.base_dir)
        if path is None or not is_reward_model(path):
            continue
        try:
            config = read_config(str(path), where=field)
            load_tokenizer(ModelSource(str(path), None, None, str(path)), field)
            yield from _weights(str(path), config, "reward", field)
        except UserError as error:
            yield from error.problems
