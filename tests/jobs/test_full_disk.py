"""When a checkpoint fills the disk, the error names the disk, whatever exception the file writer raises."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.jobs.in_process import open_stage, trained

from finetune_trainer.storage.disk_full import name_full_disk

Job = dict[str, Any]
TAKES_THE_WEIGHTS = "900k"
"""Room for the weights, but not for the optimizer, which is twice as large and is written by torch."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "runs"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={TAKES_THE_WEIGHTS}", "tmpfs", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a disk that is soon full can't be mounted here: {done.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)  # the failed write may still have its file open


def test_a_checkpoint_without_room_names_the_disk(base_job: Job, tmp_path: Path, small_disk: Path) -> None:
    base_job["spec"]["stages"][0]["sft"] |= {"maxSteps": 1, "saveSteps": 1}
    context = open_stage(base_job, tmp_path)
    with pytest.raises(OSError, match="No space left on device") as caught, trained(context):
        pass
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(context.output_dir)
    assert "inline_container" in str(caught.value.__cause__), "torch has told it otherwise"
    assert list(small_disk.rglob("model.safetensors")), "the weights had room"


def test_where_there_is_room_a_fault_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="something else"), name_full_disk(tmp_path / "to" / "be" / "made"):
        raise ValueError("something else")
