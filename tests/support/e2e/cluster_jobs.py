"""FineTuneJobs of the end-to-end tests, and functions that apply them and read their results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.cluster.access import Access
from support.cluster.finetune_jobs import Jobs
from support.storage.s3_server import BUCKET, S3Server

from finetune_trainer.progress.metrics_log import read_metrics

Json = dict[str, Any]
TEXTS = [f"{a} plus {b} makes {a + b}, says the teacher." for a in range(10) for b in range(10)]
CORPUS = f"{BUCKET}/corpus/a.jsonl"
RUNS = f"{BUCKET}/runs"
SECRET = "s3"
EXPERTS = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
DENSE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def write_corpus(s3: S3Server) -> None:
    """Write the corpus that all jobs read."""
    s3.fs.pipe_file(CORPUS, "\n".join(json.dumps({"text": text}) for text in TEXTS).encode())


def give_credentials(admin: Access, namespace: str, s3: S3Server) -> None:
    """Create the Secret with the store's address and keys for jobs."""
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}}
    admin.apply(secret | {"stringData": s3.environment | {"HF_HUB_OFFLINE": "1"}}, namespace=namespace)


def job(name: str, model: Json, stages: list[Json], template: Json, nodes: int = 2) -> Json:
    """Return a job of one worker per node, with the store's credentials from a Secret."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"config": model},
            "stages": stages,
            "resources": {"nodes": nodes, "workersPerNode": 1, "cpusPerNode": "1", "podTemplate": template},
            "storage": {"uri": f"s3://{RUNS}"},
            "kubernetes": {"envFromSecrets": [SECRET], "sharedMemory": "1Gi", "checkpointGraceSeconds": 30},
        },
    }


def pipeline(name: str, template: Json) -> Json:
    """Return a job of a tokenizer, pretraining, QLoRA, DPO and ESFT of a mixture of experts."""
    dialogues = {"sources": [{"inline": [_dialogue(a) for a in range(16)]}]}
    pairs = {"sources": [{"inline": [_pair(a) for a in range(16)]}]}
    adapted = {"maxSteps": 6, "maxLength": 64, "lora": {"r": 4}, **common(3)}
    stages = [
        {"tokenizer": {"data": corpus(), "vocabSize": 320}},
        {"pretrain": {"data": corpus(), "blockSize": 64, "maxSteps": 12, **common(4)}},
        {"sft": {"data": dialogues, "quantization": {"bits": 4}, **adapted}},
        {"dpo": {"data": pairs, **adapted}},
        {"esft": {"data": dialogues, "maxSteps": 6, "maxLength": 64, **common(3)}},
    ]
    return job(name, EXPERTS, stages, template)


def long_job(name: str, template: Json, *, steps: int, save: int, nodes: int = 2) -> Json:
    """Return a job of a tokenizer and `steps` of pretraining, with a checkpoint after every `save` steps."""
    pretrain = {"data": corpus(), "blockSize": 64, "maxSteps": steps, "learningRate": 1e-4, **common(save)}
    return job(name, DENSE, [{"tokenizer": {"data": corpus(), "vocabSize": 320}}, {"pretrain": pretrain}], template,
               nodes)  # fmt: skip


def corpus() -> Json:
    return {"sources": [{"uri": f"s3://{CORPUS}"}]}


def common(save: int) -> Json:
    return {"saveSteps": save, "saveTotalLimit": 2, "loggingSteps": 1, "perDeviceTrainBatchSize": 2}


def _dialogue(a: int) -> Json:
    return {"messages": [{"role": "user", "content": f"{a} plus {a}"}, {"role": "assistant", "content": f"{2 * a}"}]}


def _pair(a: int) -> Json:
    return {"prompt": f"{a} plus 1", "chosen": f" makes {a + 1}", "rejected": f" makes {a + 3}"}


def apply(admin: Access, namespace: str, job: Json) -> None:
    """Apply a job with `kubectl apply`."""
    admin.kubectl("apply", f"--namespace={namespace}", "--filename=-", stdin=json.dumps(job))


def until_succeeded(jobs: Jobs, name: str, seconds: float) -> Json:
    """Wait until the job has succeeded, and return it.

    Raises:
        AssertionError: it failed, or takes longer.
    """
    done = jobs.until(lambda status: status["phase"] in ("Succeeded", "Failed"), name, seconds)
    assert done["status"]["phase"] == "Succeeded", json.dumps(done["status"], indent=1)
    return done


def curve(s3: S3Server, namespace: str, name: str, stage: str = "01-pretrain") -> list[tuple[int, float]]:
    """Return the (step, loss) pairs of a stage."""
    s3.fs.invalidate_cache()
    rows = read_metrics(s3.fs.cat_file(f"{RUNS}/{namespace}/{name}/stages/{stage}/metrics.jsonl").decode())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def fetch(s3: S3Server, namespace: str, name: str, stage: str, target: Path) -> Path:
    """Copy a stage's result from the store."""
    s3.fs.invalidate_cache()
    s3.fs.get(f"{RUNS}/{namespace}/{name}/stages/{stage}/result/", f"{target}/", recursive=True)
    return target
