"""Files of an `online` stage's rounds in storage, from which a resumed stage reads completions and pairs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from finetune_trainer.layout import StageLayout
from finetune_trainer.storage.filesystem import Storage

Json = dict[str, Any]
PART = "samples-"


class RoundFiles:
    """The files of one stage. Writes are atomic."""

    def __init__(self, storage: Storage, layout: StageLayout) -> None:
        self.storage, self.layout = storage, layout

    def begin(self, data: str) -> None:
        """Record which prompts the rounds use, and delete the files of rounds that used other prompts.

        Args:
            data: hash of the prompts.
        """
        path = self.layout.round_data
        if self.storage.exists(path) and self.storage.read_text(path) != data:
            for drawn in (path.rpartition("/")[0], self.layout.rounds):
                self.storage.delete(drawn)
        self.storage.write_text(path, data)

    def parts(self, number: int) -> set[int]:
        """Return the numbers of a round's sample files that exist."""
        names = (name for name in self.storage.names(self.layout.round(number)) if name.startswith(PART))
        return {int(name.removeprefix(PART).removesuffix(".jsonl")) for name in names}

    def write_part(self, number: int, part: int, rows: Iterable[Json]) -> None:
        """Write the samples of one part of a round's prompts."""
        self.storage.write_text(self._part(number, part), _lines(rows))

    def read_parts(self, number: int) -> list[Json]:
        """Return a round's samples in the order of its prompts."""
        return [row for part in sorted(self.parts(number)) for row in self._rows(self._part(number, part))]

    def pairs(self, number: int) -> list[Json] | None:
        """Return a round's pairs, or None if they do not exist yet."""
        path = self.layout.round_pairs(number)
        return self._rows(path) if self.storage.exists(path) else None

    def finish(self, number: int, samples: list[Json], pairs: list[Json]) -> None:
        """Write a round's samples as one file, then its pairs, whose file marks the round's data as complete."""
        self.storage.write_text(self.layout.round_samples(number), _lines(samples))
        self.storage.write_text(self.layout.round_pairs(number), _lines(pairs))
        for part in self.parts(number):
            self.storage.delete(self._part(number, part))

    def start(self) -> list[Json] | None:
        """Return the starting model's completions of the held-out prompts, or None if they do not exist yet."""
        path = self.layout.round_start
        return self._rows(path) if self.storage.exists(path) else None

    def write_start(self, rows: list[Json]) -> None:
        """Write the starting model's completions of the held-out prompts."""
        self.storage.write_text(self.layout.round_start, _lines(rows))

    def record(self, number: int, facts: Json) -> None:
        """Merge statistics of a round into the stage's table of rounds."""
        path = self.layout.rounds
        table = json.loads(self.storage.read_text(path)) if self.storage.exists(path) else {"rounds": []}
        rounds = {row["round"]: row for row in table["rounds"]}
        rounds[number] = {"round": number} | rounds.get(number, {}) | facts
        table["rounds"] = [rounds[one] for one in sorted(rounds)]
        self.storage.write_text(path, json.dumps(table, indent=1))

    def _part(self, number: int, part: int) -> str:
        return f"{self.layout.round(number)}/{PART}{part:06d}.jsonl"

    def _rows(self, path: str) -> list[Json]:
        return [json.loads(line) for line in self.storage.read_text(path).splitlines() if line]


def _lines(rows: Iterable[Json]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
