"""A whole pipeline as one FineTuneJob: a tokenizer, pretraining, QLoRA and DPO on two pods of one worker each."""

from __future__ import annotations

from typing import Any

from one_machine import host_paths
from s3_server import BUCKET

Json = dict[str, Any]
TEXTS = [f"{a} plus {b} makes {a + b}, says the teacher." for a in range(10) for b in range(10)]
CORPUS = f"{BUCKET}/corpus/a.jsonl"


def pipeline_job(name: str, *, steps: int = 20, save: int = 5) -> Json:
    """`steps` of pretraining, a checkpoint after every `save`."""
    corpus = {"sources": [{"uri": f"s3://{CORPUS}"}]}
    dialogues = [
        {"messages": [{"role": "user", "content": f"{a} plus {a}"}, {"role": "assistant", "content": f"{2 * a}"}]}
        for a in range(16)
    ]
    pairs = [{"prompt": f"{a} plus 1", "chosen": f" makes {a + 1}", "rejected": f" makes {a + 3}"} for a in range(16)]
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = {"model_type": "llama", **shape, "num_key_value_heads": 2, "max_position_embeddings": 64}
    common = {"saveSteps": save, "saveTotalLimit": 2, "loggingSteps": 1, "perDeviceTrainBatchSize": 2}
    adapted = {"maxSteps": 10, "maxLength": 64, "lora": {"r": 4}, **common}
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"config": model},
            "stages": [
                {"tokenizer": {"data": corpus, "vocabSize": 320}},
                {"pretrain": {"data": corpus, "blockSize": 64, "maxSteps": steps, **common}},
                {"sft": {"data": {"sources": [{"inline": dialogues}]}, "quantization": {"bits": 4}, **adapted}},
                {"dpo": {"data": {"sources": [{"inline": pairs}]}, **adapted}},
            ],
            "resources": {"nodes": 2, "workersPerNode": 1, "podTemplate": {"spec": _this_machine()}},
            "storage": {"uri": f"s3://{BUCKET}/runs"},
            "kubernetes": {"envFromSecrets": ["s3"], "sharedMemory": "1Gi"},
        },
    }


def _this_machine() -> Json:
    """Python and its packages come in from the host, where an image would have them."""
    volumes = {f"host-{index}": path for index, path in enumerate(host_paths())}
    mounts = [{"name": name, "mountPath": path, "readOnly": True} for name, path in volumes.items()]
    return {
        "volumes": [{"name": name, "hostPath": {"path": path}} for name, path in volumes.items()],
        "containers": [{"name": "trainer", "volumeMounts": mounts}],
    }
