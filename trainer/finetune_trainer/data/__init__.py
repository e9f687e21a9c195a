"""Read, check, tokenize, pack, cache and stream the data of all stages.

Names are imported on first use: `inspect` needs neither torch nor transformers, which take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_trainer.data.checks import inspect
    from finetune_trainer.data.collators import PackedCollator, PreferenceCollator, RewardCollator
    from finetune_trainer.data.preparation import prepare
    from finetune_trainer.data.report import DataReport, Prepared
    from finetune_trainer.data.row_formats import Kind
    from finetune_trainer.data.source_notes import reading_notes
    from finetune_trainer.data.streaming import StreamedRows
    from finetune_trainer.data.untokenized import corpus_texts, eval_prompts

__all__ = [
    "DataReport",
    "Kind",
    "PackedCollator",
    "PreferenceCollator",
    "Prepared",
    "RewardCollator",
    "StreamedRows",
    "corpus_texts",
    "eval_prompts",
    "inspect",
    "prepare",
    "reading_notes",
]

_MODULES = {
    "checks": ("inspect",),
    "collators": ("PackedCollator", "PreferenceCollator", "RewardCollator"),
    "row_formats": ("Kind",),
    "source_notes": ("reading_notes",),
    "preparation": ("prepare",),
    "report": ("DataReport", "Prepared"),
    "streaming": ("StreamedRows",),
    "untokenized": ("corpus_texts", "eval_prompts"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
