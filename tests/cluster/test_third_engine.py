"""An engine that only registers itself runs jobs from creation to deletion without other changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

# This module's fixture `jobs` applies to these imported tests too.
from cluster.test_operator_lifecycle import test_a_user_error_is_told_and_never_retried as test_a_user_error  # noqa: F401
from cluster.test_operator_lifecycle import test_deletion_takes_the_children_along as test_deletion  # noqa: F401
from cluster.test_operator_lifecycle import test_storage_is_emptied_before_the_job_goes as test_cleanup  # noqa: F401
from cluster.test_operator_lifecycle import (
    test_suspend_waits_for_the_checkpoint_and_resume_goes_on as test_suspend_and_resume,  # noqa: F401
)
from kubernetes import client
from support.cluster import pods_engine
from support.cluster.access import Access
from support.cluster.finetune_jobs import Jobs, condition, job
from support.cluster.life import Life, end_state
from support.cluster.operator_process import OperatorProcess


@pytest.fixture(scope="module")
def operator_with_pods(
    admin: Access, operator: OperatorProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    """Run the operator with the engine `pods` as its default engine, in place of the session's operator."""
    operator.kill()  # only one operator may reconcile the jobs of a namespace
    program = [str(Path(pods_engine.__file__))]
    directory = tmp_path_factory.mktemp("third-engine")
    settings = {"FINETUNE_DEFAULT_ENGINE": pods_engine.NAME, "FINETUNE_BACKOFF_SECONDS": "0"}
    with OperatorProcess(admin, directory, program=program, **settings) as running:
        yield running
    operator.start()


@pytest.fixture
def jobs(finetune_jobs: client.CustomObjectsApi, namespace: str, operator_with_pods: OperatorProcess) -> Jobs:
    """Return the FineTuneJobs of the test's namespace, which run on the third engine."""
    return Jobs(finetune_jobs, namespace)


def test_a_life_with_a_failure_a_retry_and_a_suspension(jobs: Jobs, api: client.ApiClient, namespace: str) -> None:
    made = jobs.create(job(kubernetes={}))
    life = Life(jobs, client.CoreV1Api(api), made["metadata"]["uid"], "127.0.0.1")
    with life.going_on():
        jobs.until_phase("Succeeded", timeout=100)
    end = end_state(jobs, life)
    assert end["attempts"] == [(1, "TrainingFailed"), (2, "Interrupted"), (3, "Completed")]
    assert life.pods == {"preflight": life.pods["preflight"], "1": ["tiny-1"], "2": ["tiny-2"], "3": ["tiny-3"]}
    batch_jobs = [item.metadata.name for item in client.BatchV1Api(api).list_namespaced_job(namespace).items]
    assert batch_jobs == ["tiny-preflight"]


def test_what_the_engine_cannot_do_is_refused(jobs: Jobs) -> None:
    jobs.create(job(resources={"nodes": 2}))
    failed = condition(jobs.until_phase("Failed"), "Failed")
    assert (failed["reason"], failed["message"]) == (
        "InvalidSpec",
        "resources.nodes: is 2: the engine pods runs one node",
    )
