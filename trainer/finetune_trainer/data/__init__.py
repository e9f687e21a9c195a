"""Data of every stage: reading, checking, tokenising, packing, caching, streaming."""

from finetune_trainer.data.checks import inspect
from finetune_trainer.data.collators import PackedCollator, PreferenceCollator
from finetune_trainer.data.forms import Kind, kind_of
from finetune_trainer.data.prepare import prepare
from finetune_trainer.data.report import DataReport, Prepared
from finetune_trainer.data.texts import corpus_texts, eval_prompts

__all__ = [
    "DataReport",
    "Kind",
    "PackedCollator",
    "PreferenceCollator",
    "Prepared",
    "corpus_texts",
    "eval_prompts",
    "inspect",
    "kind_of",
    "prepare",
]
