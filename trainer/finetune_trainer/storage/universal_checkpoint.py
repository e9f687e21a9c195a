"""DeepSpeed's shards of one number of workers made readable for any other."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from finetune_trainer.layout import MANIFEST

SUFFIX = "-universal"


def to_universal(checkpoint: Path, target: Path) -> None:
    """Make `target` a copy of a ZeRO checkpoint in DeepSpeed's universal format (arXiv 2406.18820).

    It takes about as much room as the shards do; all other files are links into `checkpoint`.
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

    # One process each: a fork of a process that has threads of torch and gloo may hang.
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    # transformers writes no `universal_checkpoint_info`, which Megatron would.
    options["inject_missing_state"] = True
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        main(Namespace(input_folder=str(source), output_folder=str(target), **options))
