"""Jobs recover without manual work and without lost steps from faults at random moments.

`benchmarks/faults.py` does the same with every kind of fault, many times.
"""

from __future__ import annotations

import os
from collections import deque

import pytest
from support.cluster.finetune_jobs import Jobs
from support.e2e.campaign import Campaign, Round, check, new_chance, same_curve
from support.e2e.cluster_jobs import apply, curve, long_job, until_succeeded
from support.e2e.clusters import Cluster
from support.e2e.faults import KINDS, Victim
from support.e2e.following import Following, Sample, recovery
from support.e2e.operator_pod import OperatorPod
from support.storage.s3_server import S3Server

SHORT = ("worker", "operator", "pod", "apiserver")
LONG = os.environ.get("FINETUNE_LONG_TESTS") == "1"
STEPS, SECONDS = (8000, 5400) if LONG else (1500, 1500)


@pytest.mark.timeout(SECONDS, func_only=True)
def test_a_job_comes_through_faults_as_if_there_were_none(
    cluster: Cluster, jobs: Jobs, operator: OperatorPod, s3: S3Server, namespace: str
) -> None:
    apply(cluster.admin, namespace, long_job("calm", cluster.pod_template, steps=STEPS, save=20))
    until_succeeded(jobs, "calm", SECONDS)
    chance = new_chance(None)
    following = Following(cluster.admin, namespace, "hit")
    victim = Victim(cluster, cluster.admin, operator, s3, namespace, "hit", following, chance)
    kinds = list(KINDS) if LONG else list(SHORT)
    chance.shuffle(kinds)
    rounds = Campaign(victim, STEPS, print).run(deque(kinds))
    check(rounds)
    same_curve(victim, curve(s3, namespace, "calm"))
    assert {round.kind for round in rounds} == set(kinds)
    (deleted,) = (round for round in rounds if round.kind == "pod")
    assert any("PodDeleted: pod hit-" in text for text in deleted.said), deleted.said


def samples(*positions: tuple[int, int]) -> list[Sample]:
    """Return one sample (attempt, step) per second of the second stage."""
    return [Sample(float(at), attempt, 1, step) for at, (attempt, step) in enumerate(positions)]


def test_recovery_is_the_first_step_after_the_break() -> None:
    found = recovery(samples((1, 8), (1, 9), (1, 9), (1, 5), (1, 6)), 1.5)
    assert found is not None and (found.seconds, found.broken, found.repeated) == (1.5, True, 5)


def test_a_new_attempt_is_a_break_even_where_no_step_is_repeated() -> None:
    found = recovery(samples((1, 8), (1, 9), (2, 10)), 1.5)
    assert found is not None and found.broken and found.repeated == 0


def test_without_a_break_the_longest_pause_counts() -> None:
    found = recovery([Sample(0, 1, 1, 1), Sample(2, 1, 1, 2), Sample(9, 1, 1, 3), Sample(10, 1, 1, 4)], 1.0)
    assert found is not None and (found.seconds, found.broken) == (7.0, False)
    assert recovery([Sample(0, 1, 1, 1)], 1.0) is None


def test_a_round_that_lost_a_checkpoint_is_told() -> None:
    lost = Round("pod", 50, 9.0, True, 12, kept=40, resumed=20)
    assert len(lost.faults) == 1 and "checkpoint 40" in lost.faults[0]
    assert Round("pod", 50, 9.0, True, 21, kept=40, resumed=40).faults == [
        "21 steps were repeated, and every 20 steps there is a checkpoint"
    ]
    assert not Round("pod", 50, 9.0, True, 10, kept=40, resumed=40).faults
