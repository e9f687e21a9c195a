"""A job's `lora` as PEFT's configuration, its names resolved and checked against the model.

PEFT is imported where it is needed: it takes longer to import than all else that a driver uses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune_api.problems import Problem, did_you_mean
from finetune_api.training import ALL_LINEAR, Lora
from finetune_trainer.errors import UserError
from finetune_trainer.model.composite import language_names
from finetune_trainer.model.task import SCORE, score_head

if TYPE_CHECKING:
    from peft import LoraConfig

_TIED = (
    "{!r} is tied to the output head, which takes no adapter (TRL's losses read its weights): "
    "put it in modulesToSave to train it in full"
)
_ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate|wg)(\.|$)")


@dataclass(frozen=True)
class Targets:
    """What of a model an adapter can be put on, by full name."""

    linears: tuple[str, ...]
    """Linear layers of the language model but the output head and routers."""
    experts: tuple[str, ...]
    """Stacked expert weights: Parameters `[experts, …, …]`, not modules."""
    embeddings: tuple[str, ...]
    head: str | None
    """The output head; a reward model's score."""
    tied: str | None = None
    """The embedding whose weights the output head has too."""
    frozen: tuple[str, ...] = ()
    """Modules of a composite model's other parts (vision tower, projector), which take no adapter."""


def lora_config(spec: Lora, model: PreTrainedModel, path: str = "lora") -> LoraConfig:
    """PEFT's configuration of an adapter on `model`, which may be on the meta device or quantized.

    `all-linear` is every linear layer and every stack of expert weights, without the output head and the routers
    (PEFT's own `all-linear` adapts Qwen3-MoE's routers too).

    Args:
        path: where the job has this spec, such as `stages[1].sft.lora`; it heads every problem.

    Raises:
        UserError: a name that nothing goes by, or what PEFT can't do: dropout or DoRA on stacked expert weights,
            an adapter on the output head (TRL's loss reads the head's weight directly). A reward model's head is
            trained in full.
    """
    targets = find_targets(model)
    from peft import LoraConfig

    modules, parameters, problems = _resolve(spec, model, targets, path)
    kept, of_saved = _saved(spec, model, targets, path)
    problems += _expert_problems(spec, parameters, path) + of_saved
    if problems:
        raise UserError(problems)
    scores = score_head(model) is not None
    saved = [*kept, *([SCORE] if scores else [])]
    return LoraConfig(
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=sorted(modules),
        target_parameters=sorted(parameters) or None,
        modules_to_save=list(dict.fromkeys(saved)) or None,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        ensure_weight_tying=_needs_tying(spec, model, modules),
    )


def find_targets(model: PreTrainedModel) -> Targets:
    """The layers of a model that an adapter can be put on."""
    inside = language_names(model)
    named = {name: module for name, module in model.named_modules() if inside(name)}
    output = score_head(model) or model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head = next((name for name, module in named.items() if module is output), None)
    experts = tuple(
        name
        for name, weight in model.named_parameters()
        if len(_shape(weight)) == 3 and ".experts." in name and inside(name)
    )
    routed = bool(experts) or is_moe(model)
    linears = tuple(
        name
        for name, module in named.items()
        if isinstance(module, (nn.Linear, Conv1D)) and name != head and not (routed and _ROUTERS.search(name))
    )
    embeddings = tuple(name for name, module in named.items() if isinstance(module, nn.Embedding))
    frozen = tuple(name for name, _ in model.named_modules() if name and not inside(name))
    inputs = model.get_input_embeddings() if is_tied(model) and score_head(model) is None else None
    tied = next((name for name, module in named.items() if module is inputs), None)
    return Targets(linears, experts, embeddings, head, tied, frozen)


def _shape(weight: nn.Parameter) -> tuple[int, ...]:
    """Return a weight's shape, also where ZeRO-3 has divided it: what a worker holds is flat then."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the input embeddings are the output head's weights, by the model's configuration."""
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


def is_moe(model: PreTrainedModel) -> bool:
    """Whether a model has experts, by its configuration."""
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def _resolve(
    spec: Lora, model: PreTrainedModel, targets: Targets, path: str
) -> tuple[set[str], set[str], list[Problem]]:
    """Names for PEFT's `target_modules` and `target_parameters`, and what is wrong with the given ones."""
    modules: set[str] = set()
    parameters: set[str] = set()
    problems: list[Problem] = []
    rewritten = _rewritten_by_peft(model)
    usable = [name for name in targets.linears if _leaf(name) not in rewritten]
    for given in spec.target_modules:
        if given == ALL_LINEAR:
            modules |= _short(usable, model)
            parameters |= _stacks([name for name in targets.experts if not name.endswith("_bias")], targets)
            continue
        stacked = [name for name in targets.experts if _goes_by(name, given)]
        layers = _of_language(given, [*usable, *targets.embeddings], targets)
        parameters |= _stacks(stacked, targets)
        modules |= layers
        if any(_goes_by(name, given) for name in targets.embeddings if name == targets.tied):
            problems.append(Problem(f"{path}.targetModules", _TIED.format(given)))
        if not stacked and not layers:
            problems.append(Problem(f"{path}.targetModules", _no_match(given, usable, targets)))
    return modules, parameters, problems


def _no_match(given: str, usable: list[str], targets: Targets) -> str:
    if targets.head is not None and _goes_by(targets.head, given):
        return f"{given!r} is the output head, which takes no adapter: put it in modulesToSave to train it in full"
    valid = {_leaf(name) for name in (*usable, *targets.experts, *targets.embeddings)} | {ALL_LINEAR}
    return _no_module(given, targets, valid)


def _expert_problems(spec: Lora, parameters: set[str], path: str) -> list[Problem]:
    """What PEFT's ParamWrapper refuses for stacked expert weights."""
    if not parameters:
        return []
    what = f"does not work on the experts' stacked weights ({', '.join(sorted(parameters))})"
    advice = "or name the other modules in targetModules, such as q_proj"
    problems = []
    if spec.lora_dropout:
        problems.append(Problem(f"{path}.loraDropout", f"{spec.lora_dropout} {what}: set 0, {advice}"))
    if spec.use_dora:
        problems.append(Problem(f"{path}.useDora", f"DoRA {what}: set false, {advice}"))
    return problems


def _saved(spec: Lora, model: PreTrainedModel, targets: Targets, path: str) -> tuple[list[str], list[Problem]]:
    """Names for PEFT's `modules_to_save`, and what is wrong with the given ones."""
    inside = language_names(model)
    names = [name for name, _ in model.named_modules() if name and inside(name)]
    leaves = {_leaf(name) for name in names if not _leaf(name).isdigit()}
    saved: list[str] = []
    problems = []
    for given in spec.modules_to_save or []:
        found = _of_language(given, names, targets)
        saved += sorted(found)
        if not found:
            problems.append(Problem(f"{path}.modulesToSave", _no_module(given, targets, leaves)))
    return saved, problems


def _no_module(given: str, targets: Targets, valid: set[str]) -> str:
    if found := _frozen_match(given, targets):
        return f"{given!r} is only in {found}, which is frozen: name modules of the language model"
    return f"no module of the model goes by {given!r}{did_you_mean(given, valid)}"


def _of_language(given: str, names: list[str], targets: Targets) -> set[str]:
    """What PEFT is to look for: the given name where it means none of the frozen modules, else the full names."""
    found = {name for name in names if _goes_by(name, given)}
    ambiguous = any(name.endswith(given) for name in targets.frozen)  # PEFT compares endings of modules to save
    return found if ambiguous or not found else {given}


def _stacks(names: list[str], targets: Targets) -> set[str]:
    """Stacked expert weights by their last part, or in full where a frozen part has experts too."""
    ambiguous = any(".experts" in f".{name}" for name in targets.frozen)
    return set(names) if ambiguous else {_leaf(name) for name in names}


def _frozen_match(given: str, targets: Targets) -> str | None:
    """The frozen module that goes by the given name, without its last part; None where there is none."""
    found = next((name for name in targets.frozen if _goes_by(name, given)), None)
    return found and (found.rpartition(".")[0] or found)


def _needs_tying(spec: Lora, model: PreTrainedModel, modules: set[str]) -> bool:
    """Tied embeddings that are trained must stay tied; PEFT warns where this is set without need."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    touched = {_leaf(name) for name in (*modules, *(spec.modules_to_save or []))}
    return is_tied(model) and bool(touched & set(EMBEDDING_LAYER_NAMES))


def _rewritten_by_peft(model: PreTrainedModel) -> frozenset[str]:
    """Names that PEFT, in families whose experts transformers 5 stacked, takes for an expert's or the router's.

    There a linear layer of that name (a shared expert's, a dense first layer's) can't be told apart, and gets no
    adapter.
    """
    from peft.utils import transformers_weight_conversion as conversion

    family = conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type, "")  # type: ignore[attr-defined]
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(family, {}))


def _short(names: list[str], model: PreTrainedModel) -> set[str]:
    """Last parts of the names, where they mean these modules and no others; else the names in full."""
    chosen = set(names)
    other_leaves = {_leaf(name) for name, _ in model.named_modules() if name not in chosen}
    return {_leaf(name) if _leaf(name) not in other_leaves else name for name in names}


def _goes_by(name: str, given: str) -> bool:
    return name == given or name.endswith(f".{given}")


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]
