"""Describe for the job's log how loading changes a saved model."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PretrainedConfig

from finetune_trainer.model.checkpoint_matching import match_checkpoint
from finetune_trainer.model.config import load_config
from finetune_trainer.model.generation import read_generation_config, repair_generation
from finetune_trainer.model.load import JobModel
from finetune_trainer.model.prequantized import quantization_method
from finetune_trainer.model.saved_model import root_of
from finetune_trainer.model.source import ModelSource
from finetune_trainer.model.task import Task, as_reward, auto_class
from finetune_trainer.model.vocabulary import added_rows


def loading_notes(source: ModelSource, job: JobModel, task: Task) -> Iterator[str]:
    """Yield a line for each change: names, heads, precision, embeddings, generation configuration, custom code.

    Call this after the preflight checks have accepted the model.
    """
    if source.name is None:
        return
    name, config = root_of(source.name), load_config(source, job.tokenizer)
    method = quantization_method(config)
    if method is None:
        yield from _weights(name, config, source.revision, task)
    elif job.spec.dequantize:
        yield f"its weights are quantized ({method}): a dequantized copy is used, in {job.cache_dir}/dequantized"
    if (rows := added_rows(job.spec, config, job.tokenizer)) is not None:
        had = config.get_text_config().vocab_size
        yield f"the embeddings get {rows - had} more rows, at the mean of the {had} old ones"
    if task == "causal":
        yield from repair_generation(read_generation_config(name, config, source.revision))
    if getattr(config, "auto_map", None):
        yield f"its custom code (auto_map) is not run: transformers' {config.model_type} is used"


def _weights(name: str, config: PretrainedConfig, revision: str | None, task: Task) -> Iterator[str]:
    reward = task == "reward"
    config = as_reward(config, None) if reward else config
    yield from match_checkpoint(name, config, auto_class(task), revision, new_head=reward).notes()
