"""No attribute of our trainers shadows one of transformers' or TRL's trainers.

Their constructors set attributes before ours are used, so a name that both use works until the base's code reads it:
`StageTrainer.tools` did so in GRPO. Names are read from the sources, since many are set in branches.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from pathlib import Path

import pytest
import transformers
import trl

from finetune_trainer.stages.dpo.stage import DpoTrainer
from finetune_trainer.stages.esft.stage import EsftTrainer
from finetune_trainer.stages.kto.stage import KtoTrainer
from finetune_trainer.stages.online.round_trainer import RoundTrainer
from finetune_trainer.stages.online.stage import OnlineTrainer
from finetune_trainer.stages.pretrain.stage import CausalTrainer, MaskedTrainer
from finetune_trainer.stages.reward.stage import RewardTrainer
from finetune_trainer.stages.rlhf.policy import PolicyTrainer
from finetune_trainer.stages.rlhf.stage import GrpoTrainer, RlooTrainer
from finetune_trainer.stages.sft.stage import SftTrainer
from finetune_trainer.training.preference_trainer import PreferenceTrainer
from finetune_trainer.training.stage_trainer import StageTrainer

OURS = [StageTrainer, PreferenceTrainer, PolicyTrainer, RoundTrainer]
STAGES = [SftTrainer, CausalTrainer, MaskedTrainer, EsftTrainer, DpoTrainer, KtoTrainer, RewardTrainer, RlooTrainer,
          GrpoTrainer, OnlineTrainer]  # fmt: skip
BASES = [transformers.Trainer, trl.SFTTrainer, trl.DPOTrainer, trl.RewardTrainer, trl.RLOOTrainer, trl.GRPOTrainer,
         trl.KTOTrainer]  # fmt: skip
HOOKS = {
    "__init__",
    "_calculate_rewards",
    "_compute_loss",
    "_generate_single_turn",
    "_get_grad_norm",
    "training_step",
    "_load_from_checkpoint",
    "_precompute_ref_logps",
    "_prepare_dataset",
    "_prepare_inputs",
    "_run_epoch",
    "_save_checkpoint",
    "_tokenize_prompts",
    "compute_loss",
    "create_optimizer",
    "evaluate",
    "evaluation_loop",
    "get_batch_samples",
    "get_eval_dataloader",
    "get_train_dataloader",
    "log",
    "prediction_step",
    "save_model",
}
"""Methods of the base trainers that ours override on purpose."""
SET = {
    "accelerator": "swapped for a moment while a batch is measured",
    "aux_loss_enabled": "off while a batch is measured",
    "control": "transformers' own way to pass on what callbacks ask for",
    "eos_token_ids": "TRL has no argument for the tokens that end an answer",
    "reward_func_names": "TRL has no argument for the names of rewards",
}
"""Attributes of the base trainers that ours set on purpose, and why."""
_IGNORED = {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__firstlineno__", "__annotations__",
            "__static_attributes__", "__annotate_func__", "__annotate__", "__parameters__"}  # fmt: skip


def test_every_trainer_is_looked_at() -> None:
    """The list has the trainers of all stages, so that a new stage's cannot be forgotten."""
    found: set[type] = set()
    todo: list[type] = [StageTrainer]
    while todo:
        kind = todo.pop()
        found.add(kind)
        todo += kind.__subclasses__()
    assert {one.__name__ for one in found if one.__module__.startswith("finetune_trainer.")} == {
        one.__name__ for one in [*OURS, *STAGES]
    }


@pytest.mark.parametrize("trainer", STAGES)
def test_no_name_hides_a_base_trainers(trainer: type) -> None:
    ours = [kind for kind in trainer.__mro__ if kind.__module__.startswith("finetune_trainer.")]
    theirs = {kind for base in [*BASES, *trainer.__mro__] for kind in base.__mro__} - set(ours) - {object}
    their_defined = set().union(*map(_defined, theirs))
    their_names = their_defined | set().union(*map(_assigned, theirs))
    defined = set().union(*map(_defined, ours)) - HOOKS
    assigned = set().union(*map(_assigned, ours)) - SET.keys()
    assert "stage" in assigned and {"tools", "accelerator", "args"} <= their_names  # the sources were read
    assert not defined & their_names
    assert not assigned & their_names
    assert assigned == {"stage"}, "attributes of our own belong in `stage`"


def test_the_lists_of_exceptions_are_true() -> None:
    """Each listed exception is a name of a base trainer, and is used."""
    bases = {kind for base in BASES for kind in base.__mro__} - {object}
    theirs = set().union(*map(_defined, bases)) | set().union(*map(_assigned, bases))
    ours = [kind for trainer in STAGES for kind in trainer.__mro__ if kind.__module__.startswith("finetune_trainer.")]
    assert set().union(*map(_defined, ours)) >= HOOKS and HOOKS - {"__init__"} <= theirs
    assert SET.keys() <= set().union(*map(_assigned, ours)) | {"accelerator"} and SET.keys() <= theirs


@cache
def _defined(kind: type) -> set[str]:
    """Return the names that a class's body binds or annotates."""
    return (set(vars(kind)) | set(inspect.get_annotations(kind))) - _IGNORED


@cache
def _assigned(kind: type) -> set[str]:
    """Return the names that a class's methods set on `self`."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return set()
    return _set_on("self", textwrap.dedent(source))


def _set_on(owner: str, source: str) -> set[str]:
    """Return the attributes that the source sets on a variable."""
    stores = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute))
    return {
        node.attr
        for node in stores
        if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == owner
    }


def test_no_name_is_set_from_outside() -> None:
    """`trainer.NAME = ...` outside the class adds attributes that the class does not show."""
    sources = Path(inspect.getfile(StageTrainer)).parents[1].rglob("*.py")
    assert set().union(*(_set_on("trainer", path.read_text()) for path in sources)) == {"accelerator", "train_dataset"}
