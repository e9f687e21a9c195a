"""Convert a job's `lora` to PEFT's configuration; resolve its module names and check them against the model.

PEFT is imported inside functions: its import takes longer than all other imports of a driver.
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
    """The modules and parameters of a model that can have an adapter, by full name."""

    linears: tuple[str, ...]
    """Linear layers of the language model, without the output head and routers."""
    experts: tuple[str, ...]
    """Stacked expert weights: Parameters [experts, ..., ...], not modules."""
    embeddings: tuple[str, ...]
    head: str | None
    """The output head; for a reward model, its score head."""
    tied: str | None = None
    """The embedding that shares its weights with the output head."""
    frozen: tuple[str, ...] = ()
    """Modules of a composite model's other parts (vision tower, projector), which can't have adapters."""


def lora_config(spec: Lora, model: PreTrainedModel, path: str = "lora") -> LoraConfig:
    """Return PEFT's configuration of an adapter on `model`, which may be on the meta device or quantized.

    `all-linear` means every linear layer and every stack of expert weights, without the output head and the routers
    (PEFT's own `all-linear` includes Qwen3-MoE's routers). A reward model's head is trained in full.

    Args:
        path: the spec's path in the job, such as `stages[1].sft.lora`, for error messages.

    Raises:
        UserError: a name matches no module, or PEFT does not support the combination: dropout or DoRA on stacked
            expert weights, or an adapter on the output head (TRL's loss reads the head's weight directly).
    """
    targets = find_targets(model)
    from peft import LoraConfig

    modules, parameters, problems = _resolve(spec, model, targets, path)
    kept, of_saved = _modules_to_save(spec, model, targets, path)
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
    """Return the layers of a model that can have an adapter."""
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
    """Return a weight's shape. Under ZeRO-3 a worker's part is flat, and `ds_shape` has the whole weight's shape."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the configuration ties the input embeddings to the output head."""
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


def is_moe(model: PreTrainedModel) -> bool:
    """Return whether a model's configuration has experts."""
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def _resolve(
    spec: Lora, model: PreTrainedModel, targets: Targets, path: str
) -> tuple[set[str], set[str], list[Problem]]:
    """Return names for PEFT's `target_modules` and `target_parameters`, and the problems found."""
    modules: set[str] = set()
    parameters: set[str] = set()
    problems: list[Problem] = []
    rewritten = _rewritten_by_peft(model)
    usable = [name for name in targets.linears if _leaf(name) not in rewritten]
    for requested in spec.target_modules:
        if requested == ALL_LINEAR:
            modules |= _shorten(usable, model)
            parameters |= _stack_names([name for name in targets.experts if not name.endswith("_bias")], targets)
            continue
        stacked = [name for name in targets.experts if _matches(name, requested)]
        layers = _language_model_names(requested, [*usable, *targets.embeddings], targets)
        parameters |= _stack_names(stacked, targets)
        modules |= layers
        if any(_matches(name, requested) for name in targets.embeddings if name == targets.tied):
            problems.append(Problem(f"{path}.targetModules", _TIED.format(requested)))
        if not stacked and not layers:
            problems.append(Problem(f"{path}.targetModules", _no_match(requested, usable, targets)))
    return modules, parameters, problems


def _no_match(requested: str, usable: list[str], targets: Targets) -> str:
    if targets.head is not None and _matches(targets.head, requested):
        return f"{requested!r} is the output head, which takes no adapter: put it in modulesToSave to train it in full"
    valid = {_leaf(name) for name in (*usable, *targets.experts, *targets.embeddings)} | {ALL_LINEAR}
    return _no_module(requested, targets, valid)


def _expert_problems(spec: Lora, parameters: set[str], path: str) -> list[Problem]:
    """Return problems for what PEFT's ParamWrapper does not support on stacked expert weights."""
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


def _modules_to_save(
    spec: Lora, model: PreTrainedModel, targets: Targets, path: str
) -> tuple[list[str], list[Problem]]:
    """Return names for PEFT's `modules_to_save`, and the problems found."""
    inside = language_names(model)
    names = [name for name, _ in model.named_modules() if name and inside(name)]
    leaves = {_leaf(name) for name in names if not _leaf(name).isdigit()}
    saved: list[str] = []
    problems = []
    for requested in spec.modules_to_save or []:
        found = _language_model_names(requested, names, targets)
        saved += sorted(found)
        if not found:
            problems.append(Problem(f"{path}.modulesToSave", _no_module(requested, targets, leaves)))
    return saved, problems


def _no_module(requested: str, targets: Targets, valid: set[str]) -> str:
    if found := _frozen_match(requested, targets):
        return f"{requested!r} is only in {found}, which is frozen: name modules of the language model"
    return f"no module of the model goes by {requested!r}{did_you_mean(requested, valid)}"


def _language_model_names(requested: str, names: list[str], targets: Targets) -> set[str]:
    """Return names that PEFT finds in the language model alone: the requested one if unambiguous, else full names."""
    found = {name for name in names if _matches(name, requested)}
    ambiguous = any(name.endswith(requested) for name in targets.frozen)  # PEFT compares endings of modules to save
    return found if ambiguous or not found else {requested}


def _stack_names(names: list[str], targets: Targets) -> set[str]:
    """Return the last parts of stacked expert weights' names, or full names where a frozen part has experts too."""
    ambiguous = any(".experts" in f".{name}" for name in targets.frozen)
    return set(names) if ambiguous else {_leaf(name) for name in names}


def _frozen_match(requested: str, targets: Targets) -> str | None:
    """Return the parent of a frozen module that matches the requested name, or None."""
    found = next((name for name in targets.frozen if _matches(name, requested)), None)
    return found and (found.rpartition(".")[0] or found)


def _needs_tying(spec: Lora, model: PreTrainedModel, modules: set[str]) -> bool:
    """Return whether tied embeddings are trained and must stay tied; PEFT warns if this is set needlessly."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    touched = {_leaf(name) for name in (*modules, *(spec.modules_to_save or []))}
    return is_tied(model) and bool(touched & set(EMBEDDING_LAYER_NAMES))


def _rewritten_by_peft(model: PreTrainedModel) -> frozenset[str]:
    """Return names that PEFT always treats as an expert's or the router's in families with stacked experts.

    PEFT can't distinguish other linear layers with these names (a shared expert's, a dense first layer's), so they get
    no adapter.
    """
    from peft.utils import transformers_weight_conversion as conversion

    family = conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type, "")
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(family, {}))


def _shorten(names: list[str], model: PreTrainedModel) -> set[str]:
    """Return each name's last part where it matches these modules alone, else the full name."""
    chosen = set(names)
    other_leaves = {_leaf(name) for name, _ in model.named_modules() if name not in chosen}
    return {_leaf(name) if _leaf(name) not in other_leaves else name for name in names}


def _matches(name: str, requested: str) -> bool:
    return name == requested or name.endswith(f".{requested}")


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]
