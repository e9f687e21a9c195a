"""The operator logs its operations and the attempts of jobs."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.log_lines import attempt_lines, operation_line
from finetune_operator.plan import Annotate, Create, Delete, Operation, PatchStatus, SetFinalizers

JOB = "/apis/finetune.dev/v1alpha1/namespaces/ml/finetunejobs/tiny"
RUN = "/apis/batch/v1/namespaces/ml/jobs/tiny-1"
EVENT = {"kind": "Event", "reason": "Training", "metadata": {"namespace": "ml", "name": "tiny.1"}}
STARTED: dict[str, Any] = {"number": 1, "startTime": "2026-01-01T00:00:00Z"}
ENDED = STARTED | {"endTime": "2026-01-01T00:01:00Z", "exitCode": None, "counts": False, "message": ""}


@pytest.mark.parametrize(
    ("operation", "line"),
    [
        (Create("", {"kind": "Job", "metadata": {"namespace": "ml", "name": "tiny-1"}}), "create Job ml/tiny-1"),
        (Create("", EVENT), "create Event ml/tiny.1 (Training)"),
        (Delete(RUN), "delete jobs ml/tiny-1"),
        (Annotate(RUN, {"step": "4"}), "annotate jobs ml/tiny-1: step=4"),
        (SetFinalizers(JOB, "1", ("a", "b")), "set finalizers of finetunejobs ml/tiny: a, b"),
        (SetFinalizers(JOB, "1", ()), "set finalizers of finetunejobs ml/tiny: none"),
        (
            PatchStatus(f"{JOB}/status", "u", "1", {"phase": "Running", "step": "4/10", "progress": {}}),
            "patch status of finetunejobs ml/tiny: phase Running, step 4/10",
        ),
        (PatchStatus(f"{JOB}/status", "u", "1", {"plan": None}), "patch status of finetunejobs ml/tiny: plan"),
    ],
)
def test_an_operation_is_one_line(operation: Operation, line: str) -> None:
    assert operation_line(operation) == line


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        ([], [STARTED], ["attempt 1 started"]),
        ([STARTED], [STARTED], []),
        ([STARTED], [ENDED | {"reason": "Completed"}], ["attempt 1 ended: Completed"]),
        (
            [STARTED],
            [ENDED | {"reason": "NodeLost", "message": "pod a: its node\ndoes not answer"}],
            ["attempt 1 ended: NodeLost: pod a: its node does not answer"],
        ),
        (
            [],
            [ENDED | {"reason": "OOMKilled", "message": "no memory", "exitCode": 137, "counts": True}],
            ["attempt 1 started", "attempt 1 failed: OOMKilled (exit code 137): no memory"],
        ),
    ],
)
def test_an_attempt_has_a_line_for_its_start_and_one_for_its_end(
    before: list[Any], after: list[Any], lines: list[str]
) -> None:
    assert list(attempt_lines({"attempts": before}, {"attempts": after})) == lines
