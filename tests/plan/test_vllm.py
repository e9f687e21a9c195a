"""The choice between transformers and vLLM for `rlhf`, and the GPU memory of vLLM.

vLLM itself needs a GPU. The tests have only the metadata of its distribution, which is all that the project reads
before a stage starts.
"""

from __future__ import annotations

import sys
from importlib.metadata import requires, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from support.plan.tiny_models import FIELDS
from transformers import AutoConfig, Qwen3Config

from finetune_api.runconfig import RunConfig
from finetune_trainer.errors import UserError
from finetune_trainer.plan import PlanContext, plan_job
from finetune_trainer.plan.devices import Device, known_device
from finetune_trainer.plan.memory import CONTEXT, Workload
from finetune_trainer.plan.model_size import meta_model, model_size
from finetune_trainer.plan.records import DataSize, StagePlan
from finetune_trainer.plan.vllm import utilization, vllm_bytes
from finetune_trainer.plan.vllm_version import REQUIREMENT, TORCH, VERSION

DATA = {"sources": [{"inline": [{"prompt": "x"}]}]}
TINY = {"model_type": "qwen3"} | FIELDS["qwen3"]
SFT = {"sft": {"data": {"sources": [{"inline": [{"text": "x"}]}]}, "maxLength": 32}}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that installs metadata of a `vllm` version, without code."""

    def add(release: str) -> None:
        folder = tmp_path / "site" / f"vllm-{release}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n")
        monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])

    return add


def plan(fields: dict[str, Any] | None = None, device: str = "H200", model: dict[str, Any] | None = None,
         before: dict[str, Any] | None = SFT) -> StagePlan:  # fmt: skip
    """Return the plan of an `rlhf` stage that generates 8 answers at once, with up to 10 prompt and 16 new tokens."""
    rlhf = {"data": DATA, "rewards": [{"regex": "a"}], "generation": {"maxNewTokens": 16}, "numGenerations": 4}
    spec = {"model": {"path": "m"} | (model or {}), "stages": [before] if before else []}
    spec["stages"].append({"rlhf": rlhf | {"perDeviceTrainBatchSize": 2} | (fields or {})})
    job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "p"}, "spec": spec}
    run = RunConfig.model_validate({"job": job, "root": "/tmp/x", "baseDir": "/tmp", "cacheDir": "/tmp/c"})
    place = known_device(device) or Device("CPU", 8 << 30, "cpu")
    context = PlanContext(place, 1, AutoConfig.for_model(**TINY))
    return plan_job(run, context, rows=lambda index: DataSize(20, 200, 10)).stages[-1]


def engine(found: StagePlan) -> str:
    return next((note for note in found.notes if "generate" in note), "")


def test_vllm_is_chosen_where_it_fits_and_its_memory_is_planned(install: Any) -> None:
    without = plan()
    install("0.30.2")
    found = plan()
    assert engine(found) == "vLLM 0.30.2 generates the answers, beside the model in training"
    size = model_size(meta_model(AutoConfig.for_model(**TINY)))
    assert found.memory.drawing == vllm_bytes(size, Workload(8, 26, 2, drawn=8)) > CONTEXT["cuda"]
    assert without.memory.drawing < found.memory.drawing


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fields": {"vllm": "off"}}, "vllm is off"),
        ({"fields": {"lora": {}, "quantization": {"bits": 4}}}, "quantized model in training"),
        ({"before": None, "model": {"dequantize": True}}, "model.dequantize"),
        ({"before": None, "model": {"resizeEmbeddings": "auto"}}, "model.resizeEmbeddings"),
    ],
)
def test_transformers_is_chosen_with_a_reason(install: Any, changes: dict[str, Any], reason: str) -> None:
    install("0.30.2")
    found = plan(**changes)
    assert engine(found).startswith("transformers generates the answers: ") and reason in engine(found)


def test_a_job_on_cpus_does_not_ask_for_it(install: Any) -> None:
    install("0.33.0")
    assert engine(plan(device="none")) == ""


def test_what_to_install_is_said(install: Any) -> None:
    why = f"vLLM is not installed (`pip install '{REQUIREMENT}'`)"
    assert engine(plan()) == f"transformers generates the answers: {why}"


@pytest.mark.parametrize("release", ["0.29.1", "0.31.0", "0.33.0", "0.3.0", "0.300"])
def test_another_version_is_refused(install: Any, release: str) -> None:
    install(release)
    with pytest.raises(UserError) as refused:
        plan()
    (problem,) = refused.value.problems
    assert problem.path == "stages[1].rlhf.vllm"
    assert f"found vLLM {release}, expected {VERSION}.*" in problem.message and "vllm: off" in problem.message
    assert engine(plan({"vllm": "off"})).endswith("vllm is off")


def test_its_memory_by_hand() -> None:
    """Qwen3-8B generates 32 answers of 1,024 tokens in bfloat16.

    Weights: 16.4 GB. KV cache: 36 layers x 2 x 8 heads x 128 x 2 bytes = 147,456 bytes per token, 4.83 GB.
    Profiling: 4,096 tokens x (4 x 4,096 + 3 x 12,288) x 2 bytes = 0.44 GB, and logits of 32 answers x 151,936 x 12
    bytes = 0.06 GB. CUDA context: 0.67 GB. Together 22.4 GB of 150.3 GB.
    """
    config = Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=False,
    )  # fmt: skip
    needed = vllm_bytes(model_size(meta_model(config)), Workload(32, 1024, 2, drawn=32))
    assert needed == pytest.approx(16.38e9 + 4.83e9 + 0.44e9 + 0.06e9 + 0.67e9, rel=0.005)
    assert utilization(needed, 140 << 30) == pytest.approx(0.149, abs=0.0011)
    assert utilization(needed, 140 << 30) * (140 << 30) >= needed
    assert utilization(needed, 1 << 30) == 1.0


def test_the_worker_sets_what_is_planned(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.stages.rlhf import stage

    install("0.30.2")
    planned, gpu = plan(), known_device("H200")
    assert gpu is not None
    monkeypatch.setattr(stage, "local_device", lambda: gpu)
    assert stage.engine_arguments(_context(accelerator=True), _spec()) == {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": utilization(planned.memory.drawing, gpu.memory_bytes),
        "vllm_max_model_length": 26,
    }
    assert stage.engine_arguments(_context(accelerator=False), _spec()) == {"use_vllm": False}


def _context(accelerator: bool) -> Any:
    """Return the fields of a stage's context that `engine_arguments` reads."""
    import torch

    job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "p"},
           "spec": {"model": {"path": "m"}, "stages": [SFT, {"rlhf": _spec().model_dump(by_alias=True)}]}}  # fmt: skip
    run = RunConfig.model_validate({"job": job, "root": "/tmp/x", "baseDir": "/tmp", "cacheDir": "/tmp/c"})
    return SimpleNamespace(
        placement=SimpleNamespace(accelerator=accelerator), run=run, layout=SimpleNamespace(index=1),
        data=SimpleNamespace(report=SimpleNamespace(longest=10)), config=AutoConfig.for_model(**TINY),
        precision=SimpleNamespace(compute=torch.bfloat16),
    )  # fmt: skip


def _spec() -> Any:
    from finetune_api.stages import RlhfSpec

    rlhf = {"data": DATA, "rewards": [{"regex": "a"}], "generation": {"maxNewTokens": 16}, "numGenerations": 4}
    return RlhfSpec.model_validate(rlhf | {"perDeviceTrainBatchSize": 2})


def test_the_pin_is_of_the_installed_libraries() -> None:
    """A new torch or TRL needs another vLLM, so this test fails when either changes.

    `vllm_version` must then be resolved again.
    """
    assert version("torch").startswith(f"{TORCH}.")
    (allowed,) = (one for one in map(Requirement, requires("trl") or []) if one.name == "vllm" and "extra" in str(one))
    assert allowed.specifier.contains(f"{VERSION}.0")
