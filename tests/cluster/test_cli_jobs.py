"""`finetune submit`, `status`, `suspend`, `resume`, `delete` and `wait` work on a real API server."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client
from support.cluster.access import Access
from support.cluster.api_calls import Call, Fault
from support.cluster.faulty_proxy import FaultyProxy
from support.cluster.finetune_command import Finetune, write_status
from support.cluster.finetune_jobs import Jobs, job
from support.cluster.sample_statuses import FAILED, RUNNING, SUCCEEDED, conditions

from finetune_api.job import GROUP, PLURAL, VERSION
from finetune_cli.cluster.connection import Target, connect
from finetune_cli.cluster.watching import follow

Json = dict[str, Any]


@pytest.fixture
def jobs(finetune_jobs: client.CustomObjectsApi, namespace: str) -> Jobs:
    return Jobs(finetune_jobs, namespace)


@pytest.fixture
def finetune(admin: Access, namespace: str, jobs: Jobs, tmp_path: Path) -> Finetune:
    return Finetune(admin.kubeconfig(tmp_path / "kubeconfig", namespace))


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job()))
    return path


def test_submit_creates_what_was_written_and_nothing_else(finetune: Finetune, jobs: Jobs, job_file: Path) -> None:
    done = finetune("submit", job_file, "--set", "stages[1].pretrain.maxSteps=7")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(f"tiny created in namespace {jobs.namespace}\nnext: finetune status tiny --watch")
    made = jobs.read()
    assert made["spec"]["stages"][1]["pretrain"]["maxSteps"] == 7
    assert made["spec"]["kubernetes"]["preflight"] is False
    again = finetune("submit", job_file)
    assert again.exit_code == 2
    assert "job 'tiny' already exists in namespace" in again.stderr and "--update" in again.stderr


def test_submit_tells_every_fault_before_it_asks_the_cluster(finetune: Finetune, jobs: Jobs, job_file: Path) -> None:
    done = finetune("submit", job_file, "--set", "resources.nodes=0", "--set", "stages[1].pretrain.lr=1")
    assert done.exit_code == 2
    assert "resources.nodes" in done.stderr and "did you mean `learningRate`" in done.stderr
    assert jobs.api.list_namespaced_custom_object(GROUP, VERSION, jobs.namespace, PLURAL)["items"] == []


def test_a_dry_run_makes_nothing(finetune: Finetune, jobs: Jobs, job_file: Path) -> None:
    done = finetune("submit", job_file, "--dry-run")
    assert (done.exit_code, done.stdout) == (0, f"tiny: valid in namespace {jobs.namespace}; nothing was created\n")
    assert finetune("status", "tiny").exit_code == 2


def test_an_update_changes_the_run_policy_and_is_refused_for_the_rest(
    finetune: Finetune, jobs: Jobs, job_file: Path
) -> None:
    assert finetune("submit", job_file, "--update").exit_code == 0
    done = finetune("submit", job_file, "--update", "--set", "runPolicy.backoffLimit=9")
    assert done.stdout.startswith("tiny changed"), done.stderr
    assert jobs.read()["spec"]["runPolicy"]["backoffLimit"] == 9
    refused = finetune("submit", job_file, "--update", "--set", "resources.nodes=2", "--set", "sharding.zero=2")
    assert refused.exit_code == 2
    assert refused.stderr.count("is immutable, only runPolicy can change") == 2


def test_a_namespace_of_the_job_that_is_not_the_one_given(finetune: Finetune, job_file: Path) -> None:
    done = finetune("submit", job_file, "--set", "metadata.namespace=other", "-n", "default")
    assert done.exit_code == 2
    assert "metadata.namespace: is 'other', but --namespace is 'default'" in done.stderr
    done = finetune("submit", job_file, "--set", "metadata.namespace=not-there")
    assert done.exit_code == 2
    assert 'namespaces "not-there" not found' in done.stderr


def test_the_list_is_that_of_kubectl(finetune: Finetune, jobs: Jobs, admin: Access) -> None:
    for name in ("tiny", "other"):
        jobs.create(job(name))
    write_status(jobs, RUNNING)
    lines = finetune("status").stdout.splitlines()
    assert lines[0].split() == ["NAME", "PHASE", "STAGE", "STEP", "LOSS", "ETA", "ATTEMPT", "AGE"]
    assert lines[1].split()[:2] == ["other", "Pending"]
    assert lines[2].split()[:-1] == ["tiny", "Running", "2/2", "pretrain", "4/10", "3.25", "1m", "2"]
    theirs = admin.kubectl("get", "ftj", f"--namespace={jobs.namespace}").stdout.splitlines()
    assert theirs[2].split()[:-1] == lines[2].split()[:-1]
    everywhere = finetune("status", "-A", "-n", "default").stdout
    assert f"{jobs.namespace} " in everywhere and "NAMESPACE" in everywhere


def test_one_job_in_full(finetune: Finetune, jobs: Jobs) -> None:
    jobs.create(job())
    assert "no operator has processed this job yet" in finetune("status", "tiny").stdout
    write_status(jobs, RUNNING)
    shown = finetune("status", "tiny").stdout
    for words in ("stage 2/2 pretrain", "4/10  loss 3.2500  lr 2.00e-04  12.3 k tok/s  ETA 1 min 30 s", "2 min 05 s",
                  "bytes_per_token 2.5", "/pvc/t", "step 3 of stage 2, /pvc/c-3", "NodeLost", "Training"):  # fmt: skip
        assert words in shown
    write_status(jobs, FAILED)
    shown = finetune("status", "tiny").stdout
    assert "CUDAOutOfMemory (pod tiny-2-0-x, node node-a, exit code 1, attempt 2)" in shown
    assert "line 1\n  CUDA out of memory ␛[31m\n  Traceback (most recent call last):\n" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(("form", "parse"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_the_whole_object(finetune: Finetune, jobs: Jobs, form: str, parse: Any) -> None:
    jobs.create(job())
    write_status(jobs, RUNNING)
    found = parse(finetune("status", "tiny", "-o", form).stdout)
    assert found["status"] == RUNNING and found["spec"] == jobs.read()["spec"]
    assert "managedFields" not in found["metadata"]
    items = parse(finetune("status", "-o", form).stdout)["items"]
    assert [item["kind"] for item in items] == ["FineTuneJob"]


def test_a_watch_tells_each_change_until_the_end(finetune: Finetune, jobs: Jobs) -> None:
    jobs.create(job())
    with finetune.started("status", "tiny", "--watch") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "Pending · no operator has processed this job yet\n"
        write_status(jobs, RUNNING)
        line = process.stdout.readline()
        assert line == "Running · 2/2 pretrain · 4/10 · loss 3.2500 · lr 2.00e-04 · 12.3 k tok/s · ETA 1 min 30 s\n"
        write_status(jobs, SUCCEEDED)
        assert process.stdout.readline() == "Succeeded\n"
        assert process.wait(20) == 0


def test_a_list_is_watched_until_the_user_has_seen_enough(finetune: Finetune, jobs: Jobs) -> None:
    jobs.create(job())
    with finetune.started("status", "--watch") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("tiny: Pending")
        jobs.create(job("other"))
        assert process.stdout.readline().startswith("other: Pending")
        write_status(jobs, RUNNING)
        assert process.stdout.readline().startswith("tiny: Running · 2/2 pretrain")
        jobs.delete("other")
        assert process.stdout.readline() == "other: deleted\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == ""


def test_submit_and_wait_says_by_its_exit_code_how_it_ended(finetune: Finetune, jobs: Jobs, job_file: Path) -> None:
    with finetune.started("submit", job_file, "--wait") as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(3)]
        assert said[2].startswith("Pending")
        write_status(jobs, FAILED)
        assert "Set stages[1].pretrain.perDeviceTrainBatchSize to 4" in process.stdout.readline()
        assert process.wait(20) == 1


@pytest.mark.parametrize(
    ("status", "goal", "code", "words"),
    [
        (SUCCEEDED, "Succeeded", 0, "tiny: Succeeded"),
        (SUCCEEDED, "running", 0, "tiny: Running"),
        (FAILED, "Succeeded", 1, "tiny: Failed. CUDAOutOfMemory: Set stages[1]"),
        (FAILED, "Failed", 0, "tiny: Failed"),
        (RUNNING, "Running", 0, "tiny: Running"),
        (RUNNING, "Suspended", 124, "tiny: not Suspended within 0.2 s; it is Running"),
    ],
)
def test_wait(finetune: Finetune, jobs: Jobs, status: Json, goal: str, code: int, words: str) -> None:
    jobs.create(job())
    write_status(jobs, status)
    done = finetune("wait", "tiny", "--for", goal, "--timeout", "0.2s")
    assert done.exit_code == code, done.stderr
    assert words in (done.stderr if code else done.stdout)


def test_wait_goes_on_until_the_change_comes(finetune: Finetune, jobs: Jobs) -> None:
    jobs.create(job())
    with finetune.started("wait", "tiny", "--timeout", "40s") as process:
        write_status(jobs, RUNNING)
        write_status(jobs, SUCCEEDED)
        assert process.wait(30) == 0
    with finetune.started("wait", "tiny", "--for", "deleted", "--timeout", "40s") as process:
        jobs.delete()
        assert process.wait(30) == 0


def test_a_wait_for_a_change_that_the_operator_has_not_seen(finetune: Finetune, jobs: Jobs) -> None:
    jobs.create(job(runPolicy={"suspend": True}))
    suspended = {"phase": "Suspended", "observedGeneration": 1, "conditions": conditions(Suspended="True Suspended")}
    write_status(jobs, suspended)
    assert finetune("wait", "tiny", "--for", "Suspended", "--timeout", "5").exit_code == 0
    assert finetune("resume", "tiny").exit_code == 0
    assert finetune("wait", "tiny", "--for", "Suspended", "--timeout", "0.2").exit_code == 124


def test_suspend_and_resume(finetune: Finetune, jobs: Jobs) -> None:
    jobs.create(job())
    done = finetune("suspend", "tiny")
    assert done.stdout == "tiny saves a checkpoint and stops\nnext: finetune wait tiny --for Suspended\n", done.stderr
    assert jobs.read()["spec"]["runPolicy"]["suspend"] is True
    assert "no change" in finetune("suspend", "tiny").stdout
    assert "continues from its last checkpoint" in finetune("resume", "tiny").stdout
    assert jobs.read()["spec"]["runPolicy"]["suspend"] is False
    write_status(jobs, SUCCEEDED)
    over = finetune("suspend", "tiny")
    assert over.exit_code == 2 and "job 'tiny' has ended (Succeeded)" in over.stderr


def test_delete_asks_first(finetune: Finetune, jobs: Jobs) -> None:
    jobs.create(job())
    asked = finetune("delete", "tiny")
    assert asked.exit_code == 2 and "--yes" in asked.stderr
    assert jobs.read()
    done = finetune("delete", "tiny", "--yes")
    assert done.exit_code == 0, done.stderr
    jobs.until_gone("tiny")


@pytest.mark.parametrize("command", [["status"], ["logs"], ["suspend"], ["resume"], ["delete", "--yes"], ["wait"]])
def test_a_job_that_is_not_there(finetune: Finetune, jobs: Jobs, command: list[str]) -> None:
    jobs.create(job("support-bot"))
    done = finetune(*command, "suport-bot")
    assert done.exit_code == 2
    expected = f"error: no job 'suport-bot' in namespace {jobs.namespace}: did you mean `support-bot`?\n"
    assert done.stderr == expected
    assert "which has support-bot" in finetune(*command, "../../secrets").stderr


def test_no_cluster_no_context_no_right(
    finetune: Finetune, jobs: Jobs, admin: Access, namespace: str, tmp_path: Path
) -> None:
    missing = finetune("status", "--kubeconfig", tmp_path / "none")
    assert missing.exit_code == 2 and "--kubeconfig: no such file" in missing.stderr
    context = finetune("status", "--context", "tset")
    assert context.exit_code == 2 and "did you mean `test`?" in context.stderr
    nobody = admin.service_account(namespace, "default").kubeconfig(tmp_path / "nobody", namespace)
    refused = finetune("status", "--kubeconfig", nobody)
    assert refused.exit_code == 2 and 'cannot list resource "finetunejobs"' in refused.stderr
    stranger = Access(admin.url, admin.ca_file, "no-token-of-theirs", admin.kubectl_path)
    unknown = finetune("status", "--kubeconfig", stranger.kubeconfig(tmp_path / "stranger"))
    assert unknown.exit_code == 2 and "does not accept the credentials" in unknown.stderr
    away = finetune("status", "--kubeconfig", admin.at("https://127.0.0.1:1").kubeconfig(tmp_path / "away"))
    assert away.exit_code == 1 and "https://127.0.0.1:1 does not respond" in away.stderr
    assert finetune("status").exit_code == 0


def test_a_watch_outlives_whatever_cuts_it(
    jobs: Jobs, admin: Access, namespace: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    faults = [Fault("answer", 410), Fault("drop"), Fault("answer", 503), Fault("cut", chunks=1)]

    def rule(call: Call) -> Fault | None:
        return faults.pop(0) if call.verb == "watch" and faults else None

    proxy.rule = rule
    jobs.create(job())
    cluster = connect(Target(kubeconfig=str(admin.at(proxy.url).kubeconfig(tmp_path / "proxied", namespace))))
    notes: list[str] = []
    path = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}"
    changes = follow(cluster, path, {}, note=notes.append)
    assert [job["kind"] for job in next(changes).values()] == ["FineTuneJob"]
    phases = ("Pending", "Preflight", "Running", "Succeeded")
    seen = []
    for phase in phases:
        write_status(jobs, {"phase": phase})
        for found in changes:
            status = found[namespace, "tiny"].get("status", {})
            if status.get("phase") == phase:
                seen.append(phase)
                break
    assert tuple(seen) == phases and not faults
    assert any("connection lost" in note for note in notes) and notes[-1] == ""


def test_on_a_terminal_the_status_is_drawn_again_in_place(finetune: Finetune, jobs: Jobs) -> None:
    jobs.create(job())
    write_status(jobs, RUNNING)
    with finetune.on_a_terminal("status", "tiny", "--watch") as terminal:
        first = terminal.until("ETA 1 min 30 s")
        assert "stage 2/2 pretrain" in first and "━" in first
        write_status(jobs, RUNNING | {"progress": RUNNING["progress"] | {"step": 9, "etaSeconds": 10.0}})
        assert "\x1b[1A" in terminal.until("9/10")
        write_status(jobs, SUCCEEDED)
        terminal.until("Succeeded")
        assert terminal.exit_code() == 0
