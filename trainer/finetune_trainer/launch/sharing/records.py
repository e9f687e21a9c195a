"""What the driver's node has and the workers' nodes fetch (`launch.sharing`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Place:
    """A directory below one that every node has: the job's cache, or the Hugging Face hub's."""

    root: Literal["cache", "hub"]
    path: str


@dataclass(frozen=True)
class Offer:
    """Directories that the workers of other nodes fetch before they begin."""

    places: tuple[Place, ...] = ()
    tables: dict[str, str] = field(default_factory=dict)
    """Directories of tables of rows, by `data.places.table_name`."""
    shelf: str = ""
    """Name of the Ray actor that reads the directories; empty where they are in the job's storage."""
    marker: str = ""
    """Name of a file in the driver's directories: a node that sees it shares them, and fetches nothing."""
