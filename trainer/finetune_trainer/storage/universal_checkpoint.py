"""Converts the shards of a DeepSpeed checkpoint for another world size."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from finetune_trainer.layout import MANIFEST

SUFFIX = "-universal"


def to_universal(checkpoint: Path, target: Path) -> None:
    """Write a ZeRO checkpoint to `target` in DeepSpeed's universal format (arXiv 2406.18820).

    It needs about as much disk space as the shards; all other files are symbolic links to those of `checkpoint`.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    tag = (checkpoint / "latest").read_text().strip()
    for entry in checkpoint.iterdir():
        if entry.name not in (tag, "latest", MANIFEST):
            os.symlink(entry.absolute(), target / entry.name)
    _convert(checkpoint / tag, target / f"{tag}{SUFFIX}")


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    # One process each: a fork of a process with threads of torch and gloo may hang.
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    # transformers writes no `universal_checkpoint_info`, which Megatron would.
    options["inject_missing_state"] = True
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        main(Namespace(input_folder=str(source), output_folder=str(target), **options))
