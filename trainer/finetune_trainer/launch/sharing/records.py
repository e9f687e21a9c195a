"""Records of the directories that the workers' nodes fetch (`launch.sharing`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class SharedDirectory:
    """A directory that nodes share, below a root that every node has: the job's cache or the Hugging Face cache."""

    root: Literal["cache", "hub"]
    path: str
    """Relative to the root."""


@dataclass(frozen=True)
class Offer:
    """Directories that other nodes fetch before their workers begin."""

    directories: tuple[SharedDirectory, ...] = ()
    tables: dict[str, str] = field(default_factory=dict)
    """Directories of tables of rows, by `data.cache_usage.table_name`."""
    actor: str = ""
    """Name of the Ray actor that reads the directories. Empty if they are in the job's storage."""
    marker: str = ""
    """Name of a file in the driver's directories. A node that sees it shares the disk and fetches nothing."""
