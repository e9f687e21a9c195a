"""Replaces unclear errors of a full disk by ENOSPC.

torch's file writer notices a short write but not its cause: for a checkpoint that has filled its disk, it raises
`inline_container.cc ... unexpected pos`.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEFT_BYTES = 1 << 20
"""Below this free space a disk counts as full: a file that does not fit is written until nearly nothing is free."""


@contextmanager
def name_full_disk(directory: Path) -> Iterator[None]:
    """Run a block that writes below a directory, which need not exist yet.

    Raises:
        OSError: ENOSPC with the directory's name, instead of any exception of the block while the disk is full.
    """
    try:
        yield
    except Exception as error:
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        if shutil.disk_usage(existing).free >= LEFT_BYTES:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory)) from error
