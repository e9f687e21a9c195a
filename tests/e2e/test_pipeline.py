"""Jobs on a real kubelet, as a user runs them: undisturbed, and with a worker's pod killed on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from access import Access
from finetune_jobs import Jobs, condition
from pipeline_job import CORPUS, TEXTS, pipeline_job
from s3_server import BUCKET, S3Server

from finetune_trainer.progress.metrics_log import read_metrics

Json = dict[str, Any]
STEPS = 20
JOB_SECONDS = 400


def apply(admin: Access, namespace: str, job: Json) -> None:
    admin.kubectl("apply", f"--namespace={namespace}", "--filename=-", stdin=json.dumps(job))


def until_over(jobs: Jobs, name: str) -> Json:
    done = jobs.until(lambda status: status["phase"] in ("Succeeded", "Failed"), name, JOB_SECONDS)
    assert done["status"]["phase"] == "Succeeded", json.dumps(done["status"], indent=1)
    return done


def curve(s3: S3Server, namespace: str, name: str) -> list[tuple[int, float]]:
    """(step, loss) of pretraining."""
    path = f"{BUCKET}/runs/{namespace}/{name}/stages/01-pretrain/metrics.jsonl"
    s3.fs.invalidate_cache()
    return [(row["step"], row["loss"]) for row in read_metrics(s3.fs.cat_file(path).decode()) if "loss" in row]


@pytest.mark.timeout(3 * JOB_SECONDS, func_only=True)
def test_a_pipeline_on_two_pods_and_the_same_with_a_lost_pod(
    jobs: Jobs, admin: Access, s3: S3Server, namespace: str, tmp_path: Path
) -> None:
    s3.fs.pipe_file(CORPUS, "\n".join(json.dumps({"text": text}) for text in TEXTS).encode())
    apply(admin, namespace, pipeline_job("calm", steps=STEPS))
    done = until_over(jobs, "calm")
    assert [stage["state"] for stage in done["status"]["stages"]] == ["Succeeded"] * 4
    assert condition(done, "Planned")["status"] == "True" and len(done["status"]["attempts"]) == 1
    _loads(s3, f"{BUCKET}/runs/{namespace}/calm/stages/03-dpo/result", tmp_path)

    apply(admin, namespace, pipeline_job("hit", steps=STEPS))
    jobs.until(lambda status: status.get("lastCheckpoint", {}).get("stage") == 1, "hit", JOB_SECONDS)
    selector = "finetune.dev/job=hit,batch.kubernetes.io/job-completion-index=1"
    admin.kubectl("delete", "pod", f"--namespace={namespace}", f"--selector={selector}", "--grace-period=0", "--force")
    done = until_over(jobs, "hit")
    assert len(done["status"]["attempts"]) == 2, done["status"]["attempts"]
    assert curve(s3, namespace, "hit") == pytest.approx(curve(s3, namespace, "calm"), rel=1e-4)


def _loads(s3: S3Server, result: str, tmp_path: Path) -> None:
    """With nothing of this project."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    s3.fs.get(f"{result}/", f"{tmp_path}/result/", recursive=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "result")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "result")
    assert model(**tokenizer("2 plus 2", return_tensors="pt")).logits.isfinite().all()
