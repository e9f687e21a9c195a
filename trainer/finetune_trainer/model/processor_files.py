"""Copy the files of a composite model's processor into a result.

`AutoProcessor` loads a processor: the tokenizer with an image processor, a video processor or a feature extractor.
Training on text needs none of these files, but without them the result can't process images.
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
    """Copy a model's processor files into `directory`, without overwriting files.

    The chat template is copied only if the tokenizer has not saved one: that one was used in training.

    Args:
        name: a directory, or a hub id whose files are read from the cache.
    """
    has_template = any((directory / file).exists() for file in _TEMPLATES)
    for file in (*_SETTINGS, *(() if has_template else _TEMPLATES)):
        found = _find(name, file, revision)
        if found is not None and not (directory / file).exists():
            shutil.copyfile(found, directory / file)


def _find(name: str, file: str, revision: str | None) -> str | None:
    return cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
