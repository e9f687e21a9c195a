"""Files that a composite model's processor is loaded from, beside the tokenizer's: they go with the model.

A processor is what `AutoProcessor` loads: the tokenizer with an image processor, a video processor or a feature
extractor. Training on text uses none of them, and a result without them can't be given an image again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    CHAT_TEMPLATE_FILE,
    FEATURE_EXTRACTOR_NAME,
    IMAGE_PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    cached_file,
)

_SETTINGS = dict.fromkeys(
    (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME, VIDEO_PROCESSOR_NAME, AUDIO_TOKENIZER_NAME)
)
_TEMPLATES = (CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE)


def copy_processor(name: str, revision: str | None, directory: Path) -> None:
    """Copy the processor's files of a model into `directory`, which keeps what it has.

    The chat template is copied where the tokenizer has written none: it is the processor's too, and the one that the
    stage has trained with.

    Args:
        name: a directory or a hub id, whose files come from the cache.
    """
    has_template = any((directory / file).exists() for file in _TEMPLATES)
    for file in (*_SETTINGS, *(() if has_template else _TEMPLATES)):
        found = _find(name, file, revision)
        if found is not None and not (directory / file).exists():
            shutil.copyfile(found, directory / file)


def _find(name: str, file: str, revision: str | None) -> str | None:
    return cached_file(  # type: ignore[no-any-return]
        name,
        file,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
