"""Reinforcement learning by RLOO (arXiv 2402.14740) or GRPO (arXiv 2402.03300), full or with LoRA adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import trl

from finetune_api.stages import RlhfSpec
from finetune_trainer.generation.prompts import stop_ids
from finetune_trainer.model.config import context_length
from finetune_trainer.plan.devices import local_device
from finetune_trainer.plan.generation_memory import answered_length
from finetune_trainer.plan.memory import Workload
from finetune_trainer.plan.model_size import meta_model, model_size
from finetune_trainer.plan.vllm import choose_engine, utilization, vllm_bytes
from finetune_trainer.plan.vllm_version import installed_vllm
from finetune_trainer.rewards.from_spec import load_rewards
from finetune_trainer.stages.rlhf.policy import PolicyTrainer
from finetune_trainer.training.adapter_model import adapted_model, adapted_trainer, fresh_adapter
from finetune_trainer.training.arguments import training_arguments
from finetune_trainer.training.context import StageContext


class RlooTrainer(PolicyTrainer, trl.RLOOTrainer):
    """TRL's RLOOTrainer with the prompts, completions and rewards of `PolicyTrainer`."""


class GrpoTrainer(PolicyTrainer, trl.GRPOTrainer):
    """TRL's GRPOTrainer with the prompts, completions and rewards of `PolicyTrainer`."""


def make_trainer(context: StageContext) -> Any:
    """Return the trainer of an `rlhf` stage."""
    spec = context.spec
    assert isinstance(spec, RlhfSpec)
    # Create the arguments before the model: with ZeRO-3 they enable sharded loading.
    rloo = spec.algorithm == "rloo"
    config, kind = (trl.RLOOConfig, RlooTrainer) if rloo else (trl.GRPOConfig, GrpoTrainer)
    args = config(**_arguments(context, spec))
    model, peft_config = fresh_adapter(context) if spec.lora is None else adapted_model(context)
    stops = stop_ids(context.tokenizer, model.generation_config.eos_token_id)
    if args.use_vllm:
        args.generation_kwargs = {"stop_token_ids": stops}  # by default vLLM stops at the EOS token only
    where = f"{context.where}.rewards"
    rewards = load_rewards(spec.rewards, context.run, where, context.precision.compute, args.device)
    trl_kind = trl.RLOOTrainer if rloo else trl.GRPOTrainer
    with _reference_from(trl_kind, lambda: fresh_adapter(context)[0]):
        trainer = adapted_trainer(kind, context, model, peft_config, args, reward_funcs=[*rewards])
    trainer.begin(context, spec, rewards, stops)
    return trainer


@contextmanager
def _reference_from(trainer: type, load: Callable[[], Any]) -> Iterator[None]:
    """Make TRL's trainer load its reference model by `load` within this context.

    TRL loads it by `from_pretrained` and the policy's name, which skips our checks of the weights, added embedding rows
    and dequantized copies. TRL's constructors have no argument for a reference model.
    """
    module: Any = import_module(trainer.__module__)
    own = module.create_model_from_path
    module.create_model_from_path = lambda *_, **__: load()
    try:
        yield
    finally:
        module.create_model_from_path = own


def _arguments(context: StageContext, spec: RlhfSpec) -> dict[str, Any]:
    common = training_arguments(context)
    sampling = spec.generation
    algorithm = {} if spec.algorithm == "rloo" else {"loss_type": "dapo", "scale_rewards": "group"}
    return {
        **common,
        **algorithm,
        # TRL counts completions as rows, this project counts prompts.
        "per_device_train_batch_size": common["per_device_train_batch_size"] * spec.num_generations,
        "per_device_eval_batch_size": common["per_device_eval_batch_size"] * spec.num_generations,
        "num_generations": spec.num_generations,
        "max_completion_length": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p or 1.0,
        "top_k": sampling.top_k or 0,
        "beta": spec.beta,
        "num_iterations": spec.num_iterations,
        "epsilon": spec.epsilon,
        "reward_weights": [reward.weight for reward in spec.rewards],
        "disable_dropout": True,
        **engine_arguments(context, spec),
    }


def engine_arguments(context: StageContext, spec: RlhfSpec) -> dict[str, Any]:
    """Return TRL's arguments of the generation engine; vLLM gets the share of the GPU memory that the plan estimates.

    Raises:
        UserError: the installed version of vLLM is not supported.
    """
    kind = "cuda" if context.placement.accelerator else "cpu"
    if not choose_engine(context.run, context.layout.index, kind, installed_vllm()).vllm:
        return {"use_vllm": False}
    length = answered_length(spec, context.data.report.longest, context_length(context.config))
    drawn = spec.per_device_train_batch_size * spec.answers_per_prompt
    load = Workload(drawn, length or 1024, context.precision.compute.itemsize, drawn=drawn)
    bytes_ = vllm_bytes(model_size(meta_model(context.config)), load)
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": utilization(bytes_, local_device().memory_bytes),
        "vllm_max_model_length": length,
    }
