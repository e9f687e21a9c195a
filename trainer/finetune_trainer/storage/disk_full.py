"""A full disk, called by its name.

torch's writer of files notices that a write has come short and not why: of a checkpoint that has filled its disk it
says `inline_container.cc … unexpected pos`.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEFT_BYTES = 1 << 20
"""Of a file that finds no room, as much as there is gets written: what is left is less than a piece of it."""


@contextmanager
def name_full_disk(directory: Path) -> Iterator[None]:
    """Around what writes below a directory, or makes it.

    Raises:
        OSError: ENOSPC with the directory's name, in place of whatever failed while the disk was full.
    """
    try:
        yield
    except Exception as error:
        there = next(path for path in (directory, *directory.parents) if path.exists())
        if shutil.disk_usage(there).free >= LEFT_BYTES:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory)) from error
