"""A stage keeps its trained weights in float32 while it trains, and saves them in the job's dtype.

bfloat16 has 8 bits of precision, so an update of 1e-5 to a weight of 0.02 is usually lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.cluster.servers import free_port
from support.esft.expert_models import build
from support.jobs.in_process import open_stage, trained
from support.jobs.tiny_rows import dialogue
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from finetune_api.runconfig import RunConfig
from finetune_trainer.generation.batches import generate_batch
from finetune_trainer.generation.options import GenerationOptions
from finetune_trainer.plan import PlanContext, plan_job
from finetune_trainer.plan.devices import Device
from finetune_trainer.training.deepspeed import join_process_group
from finetune_trainer.training.stage_result import save_result

Job = dict[str, Any]
ROWS = [dialogue(f"{n} plus {n}", f"makes {n + n}") for n in range(8)]
PAIRS = [{"prompt": f"{n} plus 1", "chosen": f" makes {n + 1}", "rejected": f" says {n}"} for n in range(8)]
STAGES: dict[str, Job] = {
    "full": {"sft": {}},
    "dora": {"sft": {"lora": {"useDora": True}}},
    "modules": {"sft": {"lora": {"modulesToSave": ["embed_tokens", "norm", "input_layernorm"]}}},
    "modules, packed": {"sft": {"packing": True, "lora": {"modulesToSave": ["lm_head"]}}},
    "modules, quantized": {"sft": {"quantization": {"bits": 4}, "lora": {"modulesToSave": ["embed_tokens"]}}},
    "modules of pairs": {"dpo": {"lora": {"modulesToSave": ["embed_tokens"]}}},
    "head": {"reward": {"lora": {}}},
    "adapter alone": {"sft": {"lora": {"merge": False, "modulesToSave": ["embed_tokens"]}}},
    "experts": {"esft": {"trainNonExperts": True, "sampleTokens": 200}},
}


class _Moves(TrainerCallback):
    """Records the initial trained weights, and where any of their gradients was not 0."""

    def __init__(self) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self.touched: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.start = {name: weight.detach().clone() for name, weight in _trained(model).items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for name, weight in _trained(model).items():
            seen = weight.grad != 0 if weight.grad is not None else torch.zeros_like(weight, dtype=torch.bool)
            self.touched[name] = self.touched.get(name, torch.zeros_like(seen)) | seen


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def stage(one: Job) -> Job:
    ((kind, fields),) = one.items()
    data = {"sources": [{"inline": PAIRS if kind in ("dpo", "reward") else ROWS}]}
    steps = {"maxSteps": 3, "learningRate": 1e-5, "lrSchedulerType": "constant", "warmupSteps": 0, "weightDecay": 0.0}
    return {kind: {"data": data, "maxLength": 64, **steps, **fields}}


@pytest.mark.parametrize("name", STAGES)
def test_every_update_counts(name: str, base_job: Job, tiny_model: Path, tmp_path: Path) -> None:
    _save_base(tiny_model, tmp_path / "half", experts=name == "experts")
    base_job["spec"] |= {
        "model": {"path": str(tmp_path / "half"), "dtype": "bfloat16"},
        "stages": [stage(STAGES[name])],
    }
    moves, context = _Moves(), open_stage(base_job, tmp_path)
    with trained(context, callbacks=[moves]) as trainer:
        weights = _trained(trainer.model)
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        moved = sum(int((weight != moves.start[at])[moves.touched[at]].sum()) for at, weight in weights.items())
        touched = sum(int(one.sum()) for one in moves.touched.values())
        assert moved > 0.99 * touched and touched > 1000
        if "reward" not in STAGES[name]:
            options = GenerationOptions(max_new_tokens=4)
            assert len(generate_batch(trainer.model, context.tokenizer, ["1 plus 1", "2"], options)) == 2
        if name not in ("experts", "modules, quantized"):  # the plan of these is not exact
            _as_planned(trainer, context.run)
        if "dpo" in STAGES[name]:  # before the first step the model equals its reference to the last bit
            assert trainer.state.log_history[0]["rewards/margins"] == 0.0
        save_result(trainer, context, tmp_path / "result")
    saved = [weight for path in (tmp_path / "result").glob("*.safetensors") for weight in load_file(path).values()]
    assert {weight.dtype for weight in saved} == {torch.bfloat16}


def _as_planned(trainer: Any, run: RunConfig) -> None:
    """The memory of weights and optimizer states equals the plan."""
    memory = plan_job(run, PlanContext(Device("CPU", 8 << 30, "cpu"))).stages[0].memory
    states = (state[name] for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    assert memory.weights == sum(weight.nbytes for weight in trainer.model.parameters())
    assert memory.optimizer == sum(state.nbytes for state in states)


@pytest.fixture(scope="module")
def one_worker() -> Iterator[None]:
    """Join a process group of this process alone, which DeepSpeed requires and keeps using."""
    monkeypatch = pytest.MonkeyPatch()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
    monkeypatch.undo()


@pytest.mark.parametrize("zero", [2, 3])
def test_deepspeed_keeps_float32_copies(
    zero: int, base_job: Job, tiny_model: Path, tmp_path: Path, one_worker: None
) -> None:
    """Every trained weight has a float32 copy, also of an adapter from an earlier stage; the weights are bfloat16."""
    from deepspeed.utils import safe_get_full_fp32_param

    _save_base(tiny_model, tmp_path / "half", experts=False)
    begun = stage({"sft": {"lora": {"merge": False, "modulesToSave": ["embed_tokens"]}}})
    base_job["spec"] |= {"model": {"path": str(tmp_path / "half"), "dtype": "bfloat16"}, "stages": [begun]}
    with trained(context := open_stage(base_job, tmp_path)) as trainer:
        save_result(trainer, context, tmp_path / "begun")
    base_job["spec"]["model"]["path"] = str(tmp_path / "begun")
    join_process_group(zero, accelerator=False)
    start: dict[str, torch.Tensor] = {}
    with trained(open_stage(base_job, tmp_path, zero), callbacks=[_Copies(start)]) as trainer:
        for name, weight in _trained(trainer.model).items():
            copy = safe_get_full_fp32_param(weight)
            assert (weight.dtype, copy.dtype) == (torch.bfloat16, torch.float32)
            if "lora_" in name:  # each of these has a gradient
                assert (copy != start[name]).float().mean() > 0.99, name
        assert "base_model.model.model.embed_tokens.modules_to_save.default.weight" in start
    with trained(open_stage(base_job, tmp_path)) as trainer:
        assert not trainer.is_deepspeed_enabled  # a stage without sharding follows one with it in the same process


def test_zero3_adapts_experts_too(base_job: Job, tiny_model: Path, tmp_path: Path, one_worker: None) -> None:
    """`all-linear` finds stacked experts although ZeRO-3 has partitioned them into flat shards."""
    _save_base(tiny_model, tmp_path / "half", experts=True)
    base_job["spec"] |= {"model": {"path": str(tmp_path / "half")}, "stages": [stage({"sft": {"lora": {"r": 2}}})]}
    join_process_group(3, accelerator=False)
    with trained(open_stage(base_job, tmp_path, zero=3)) as trainer:
        adapted = {name for name in _trained(trainer.model) if ".experts." in name}
        layers = trainer.model.config.num_hidden_layers
    assert len(adapted) == 2 * 2 * layers  # two stacks with two factors each


def test_gradients_are_views_of_the_exchanged_buckets(
    base_job: Job, tiny_model: Path, tmp_path: Path, one_worker: None
) -> None:
    """Otherwise DDP, which wraps a single worker too, holds another 4 bytes per trained weight."""
    base_job["spec"] |= {"model": {"path": str(tiny_model)}, "stages": [stage({"sft": {}})]}
    seen = _Storages()
    with trained(open_stage(base_job, tmp_path), callbacks=[seen]) as trainer:
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        count = len(_trained(trainer.model))
    assert seen.storages < count / 2


class _Storages(TrainerCallback):
    """Counts the storages that hold the gradients; a bucket holds many gradients."""

    storages = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grads = [weight.grad for weight in _trained(model).values() if weight.grad is not None]
        self.storages = len({grad.untyped_storage().data_ptr() for grad in grads})


class _Copies(TrainerCallback):
    """Records DeepSpeed's initial float32 copies."""

    def __init__(self, start: dict[str, torch.Tensor]) -> None:
        self.start = start

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        self.start |= {name: safe_get_full_fp32_param(weight).clone() for name, weight in _trained(model).items()}


def _save_base(tiny_model: Path, directory: Path, experts: bool) -> None:
    """Save the stage's initial model in bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(directory)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model = build("qwen3_moe", vocab_size=len(tokenizer), **ids) if experts else _load(tiny_model)
    model.to(torch.bfloat16).save_pretrained(directory)


def _load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory)
