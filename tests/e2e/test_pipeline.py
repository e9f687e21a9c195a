"""A pipeline runs as one job on two pods, writes its results to S3, and leaves nothing in the cluster."""

from __future__ import annotations

import json
import time
from pathlib import Path

from support.cluster.access import Access
from support.cluster.finetune_jobs import Jobs, condition
from support.e2e import cgroups
from support.e2e.cluster_jobs import apply, fetch, pipeline, until_succeeded
from support.e2e.clusters import Cluster
from support.e2e.faults import WORKER
from support.storage.s3_server import S3Server

SECONDS = 500
STAGES = ["00-tokenizer", "01-pretrain", "02-sft", "03-dpo", "04-esft"]


def test_tokenizer_to_esft_on_two_pods(
    cluster: Cluster, jobs: Jobs, admin: Access, s3: S3Server, namespace: str, tmp_path: Path
) -> None:
    apply(admin, namespace, pipeline("whole", cluster.pod_template))
    jobs.until(lambda status: status["phase"] == "Running", "whole", SECONDS)
    pods = [pod for pod in _pods(admin, namespace) if "-1-" in pod["metadata"]["name"]]
    nodes = {pod["spec"]["nodeName"] for pod in pods}
    _until_all_work(pods)
    done = until_succeeded(jobs, "whole", SECONDS)

    assert len(nodes) == 2, f"both pods ran on {nodes}"
    assert [stage["state"] for stage in done["status"]["stages"]] == ["Succeeded"] * len(STAGES)
    assert condition(done, "Planned")["status"] == "True" and len(done["status"]["attempts"]) == 1
    for stage in STAGES[1:]:
        _answers(fetch(s3, namespace, "whole", stage, tmp_path / stage))
    assert not any("secret of the tests" in json.dumps(item) for item in (done, *_pods(admin, namespace)))


def _until_all_work(pods: list[dict[str, dict[str, str]]]) -> None:
    """Wait until every pod has a worker at the same time."""
    deadline, working = time.monotonic() + SECONDS, [0]
    while working != [1] * len(pods):
        assert time.monotonic() < deadline, f"workers in the pods: {working}"
        time.sleep(0.1)
        found = (map(cgroups.command_of, cgroups.processes(pod["metadata"]["uid"])) for pod in pods)
        working = [sum(command.startswith(WORKER) for command in commands) for commands in found]


def _answers(result: Path) -> None:
    """Check that a model generates text without any code of this project."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(result), AutoTokenizer.from_pretrained(result)
    assert model(**tokenizer("2 plus 2", return_tensors="pt")).logits.isfinite().all()


def _pods(admin: Access, namespace: str) -> list[dict[str, dict[str, str]]]:
    listed = admin.kubectl("get", "pods", f"--namespace={namespace}", "--output=json").stdout
    found: list[dict[str, dict[str, str]]] = json.loads(listed)["items"]
    return found
