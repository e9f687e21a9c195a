"""The stored results of an evaluation's rows, and which of them are still valid after the data changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_trainer.evaluation.results_log import ResultsLog
from finetune_trainer.evaluation.rows import EvalRow, Piece
from finetune_trainer.layout import StageLayout
from finetune_trainer.storage.filesystem import Storage


def journal(root: Path, *texts: str) -> ResultsLog:
    """Return the results log of an evaluation with these texts as rows."""
    return ResultsLog(
        Storage(str(root)), StageLayout(0, "evaluate"), "base", {row.number: row.key for row in rows(*texts)}
    )


def rows(*texts: str) -> list[EvalRow]:
    asked = [([ord(letter) for letter in text], text) for text in texts]
    return [EvalRow(at, (Piece(ids, ids),), (), text, "", False, "text") for at, (ids, text) in enumerate(asked)]


def measured(*texts: str) -> list[dict[str, Any]]:
    return [{"row": row.number, "key": row.key, "nll": 1.0} for row in rows(*texts)]


def test_a_row_that_has_changed_is_measured_again(tmp_path: Path) -> None:
    before = journal(tmp_path, "one", "two", "three")
    before.add(measured("one", "two")[:1])
    before.add(measured("one", "two")[1:])
    assert set(before.known()) == {0, 1} and not before.complete
    assert set(journal(tmp_path, "one", "other", "three").known()) == {0}


def test_a_finished_model_counts_for_the_same_rows_alone(tmp_path: Path) -> None:
    journal(tmp_path, "one", "two").finish(measured("one", "two"))
    assert journal(tmp_path, "one", "two").complete
    changed = journal(tmp_path, "one", "other")
    assert set(changed.known()) == {0} and not changed.complete
    changed.add(measured("one", "other")[1:])
    assert changed.known()[1]["key"] == measured("one", "other")[1]["key"]
    changed.finish([changed.known()[number] for number in (0, 1)])
    assert changed.complete
    assert set(journal(tmp_path, "one").known()) == {0}, "there are fewer rows now"


def test_rows_of_an_earlier_version_count(tmp_path: Path) -> None:
    journal(tmp_path, "one").finish([{"row": 0, "nll": 1.0}])
    assert journal(tmp_path, "one").complete
