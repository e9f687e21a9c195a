"""The output of the cluster commands for job statuses, options and API errors, without a cluster."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from finetune_api.labels import DRIVER, JOB_LABEL, NODE_INDEX_LABEL, ROLE_LABEL, RUN_LABEL, WORKER
from finetune_api.problems import Problem
from finetune_cli.cluster.errors import ApiError, Unreachable, explained
from finetune_cli.cluster.job_view import JobView
from finetune_cli.cluster.pods import by_node, has_ended, has_started, selector
from finetune_cli.cluster.reading import short_duration
from finetune_cli.cluster.status import summary
from finetune_cli.cluster.waiting import goal_of, outcome_of, seconds_of
from finetune_cli.outcome import CommandFailed
from finetune_trainer.errors import UserError

Json = dict[str, Any]
NOW = datetime(2026, 11, 24, 4, tzinfo=UTC)
METADATA: Json = {"name": "tiny", "namespace": "ml", "creationTimestamp": "2026-11-24T03:00:00Z", "generation": 2}


def job(**status: Any) -> Json:
    return {"metadata": METADATA, "spec": {}, "status": status}


def holding(kind: str, status: str = "True", message: str = "", generation: int = 2) -> Json:
    condition = {"type": kind, "status": status, "reason": "Why", "message": message}
    return job(conditions=[condition], observedGeneration=generation)


def drawn(body: Json, width: int = 100) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(JobView(body, NOW))
    return captured.get()


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1h30m", 5400), ("1d", 86400), ("0", 0)]
)
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-1", "1w", "1h30", "ten"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UserError, match=r"--timeout: got .*, expected a duration such as"):
        seconds_of(text)


def test_goals() -> None:
    assert goal_of("succeeded") == "Succeeded"
    with pytest.raises(UserError, match="did you mean `Suspended`"):
        goal_of("Suspend")


@pytest.mark.parametrize(
    ("body", "goal", "code"),
    [
        (holding("Succeeded"), "Succeeded", 0),
        (holding("Succeeded"), "Running", 0),
        (holding("Succeeded"), "Suspended", 1),
        (holding("Failed"), "Succeeded", 1),
        (holding("Failed"), "Failed", 0),
        (holding("Failed", generation=1), "Succeeded", 1),
        (holding("Running"), "Running", 0),
        (holding("Running"), "Succeeded", None),
        (holding("Running", "False"), "Running", None),
        (holding("Suspended", generation=1), "Suspended", None),
        (holding("Suspended"), "Suspended", 0),
        (holding("Running"), "Deleted", None),
        (None, "Deleted", 0),
        (None, "Succeeded", 2),
    ],
)
def test_when_a_wait_is_over(body: Json | None, goal: str, code: int | None) -> None:
    outcome = outcome_of(body, goal)
    assert (outcome.code if outcome else None) == code


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (-3, "0s"), (59, "59s"), (61, "1m1s"), (600, "10m"), (3600, "1h"), (12000, "3h20m"), (187200, "2d4h")],
)
def test_short_durations(seconds: float | None, text: str) -> None:
    assert short_duration(seconds) == text


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"progress": {"step": None}, "stages": [{}], "conditions": [{}], "attempts": [{}], "failure": {}},
        {"progress": {"step": 5, "total": 0, "stageIndex": None}, "lastCheckpoint": {}},
        {"progress": "new", "stages": [{"name": "[red]x", "state": "Lost", "startTime": "yesterday"}]},
    ],
)
def test_a_status_of_another_operator_is_shown_as_far_as_it_goes(status: Json) -> None:
    assert "tiny" in drawn(job(**status))
    assert "[red]x" in drawn(job(stages=[{"name": "[red]x"}]))


def test_a_job_that_stands_still_counts_no_time() -> None:
    stages = [{"name": "sft", "state": "Running", "startTime": "2026-11-24T03:00:00Z"}]
    progress = {"step": 1, "total": 2, "etaSeconds": 30.0}
    running = drawn(job(phase="Running", stages=stages, progress=progress))
    assert "1 h 00 min" in running and "ETA 30 s" in running
    failed = drawn(job(phase="Failed", stages=stages, progress=progress))
    assert "stopped" in failed and "1 h 00 min" not in failed and "ETA" not in failed


def test_a_message_draws_nothing_but_itself() -> None:
    hostile = "\x1b[2J[bold]x[/bold] \x07"
    body = holding("Running", "False", hostile)
    body["status"] |= {"phase": "\x1b]0;t\x07", "failure": {"reason": hostile, "message": hostile}}
    assert "\x1b" not in drawn(body) and "[bold]x[/bold]" in drawn(body)
    assert "\x1b" not in summary(body) and "\n" not in summary(holding("Running", "False", "a\nb"))


def pod(name: str, labels: Json, state: Json, phase: str = "Running", created: str = "1") -> Json:
    statuses = [{"name": "sidecar", "state": {"running": {}}}, {"name": "trainer", "state": state}]
    return {
        "metadata": {"name": name, "labels": labels, "creationTimestamp": created},
        "status": {"phase": phase, "containerStatuses": statuses},
    }


def test_the_newest_pod_of_each_node() -> None:
    index = NODE_INDEX_LABEL
    pods = [pod("b", {index: "0"}, {}, created="2"), pod("c", {index: "1"}, {}), pod("a", {index: "0"}, {})]
    assert {node: each["metadata"]["name"] for node, each in by_node(pods).items()} == {0: "b", 1: "c"}
    driver, worker = {ROLE_LABEL: DRIVER}, {ROLE_LABEL: WORKER}
    unnumbered = [pod("w2", worker, {}), pod("h", driver, {}), pod("w1", worker, {})]
    assert {node: each["metadata"]["name"] for node, each in by_node(unnumbered).items()} == {0: "h", 1: "w1", 2: "w2"}


def test_a_pod_has_a_log_by_its_trainer_alone() -> None:
    waiting, running = pod("a", {}, {"waiting": {}}), pod("a", {}, {"running": {}})
    assert (has_started(waiting), has_ended(waiting)) == (False, False)
    assert (has_started(running), has_ended(running)) == (True, False)
    assert has_ended(pod("a", {}, {"terminated": {}})) and has_ended(pod("a", {}, {}, "Failed"))
    assert selector("tiny", 0)["labelSelector"] == f"{JOB_LABEL}=tiny,{RUN_LABEL}=preflight"


def problems(code: int, reason: str, message: str, **details: Any) -> list[Problem]:
    error = explained(ApiError(code, reason, message, details), "https://k8s")
    assert isinstance(error, UserError)
    return error.problems


def test_refusals_name_the_field() -> None:
    causes = [
        {"field": "spec.stages[0].sft.lora.r", "message": "Invalid value: 0: too small"},
        {"field": "<nil>", "message": "some rules were not checked"},
    ]
    assert problems(422, "Invalid", "…", causes=causes) == [
        Problem("stages[0].sft.lora.r", "Invalid value: 0: too small"),
        Problem("", "some rules were not checked"),
    ]
    strict = 'strict decoding error: unknown field "spec.new", duplicate field "spec.model"'
    assert [problem.path for problem in problems(400, "BadRequest", strict)] == ["new", "model"]
    assert "install the chart finetune-operator" in str(problems(404, "NotFound", "404 page not found")[0])


def test_trouble_that_passes_is_no_fault_of_the_user() -> None:
    for error in (ApiError(503, "", "starting", {}), ApiError(429, "", "", {}), Unreachable("refused")):
        assert isinstance(explained(error, "https://k8s"), CommandFailed)


def test_without_the_kubernetes_client_the_error_names_the_extra() -> None:
    program = "import sys; sys.modules['kubernetes'] = None; from finetune_cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "status"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: this command needs the Kubernetes client: pip install 'finetune-operator[operator]'\n"


def test_the_help_loads_no_kubernetes() -> None:
    program = "import sys, finetune_cli.main; print('kubernetes' in sys.modules, 'rich.live' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False False\n"
