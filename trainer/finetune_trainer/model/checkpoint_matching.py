"""Check that a checkpoint holds exactly the tensors of the model that it is loaded into.

transformers initializes missing weights with random numbers, drops unexpected tensors, and only warns. This module
first loads the checkpoint on the meta device from the headers of its files: transformers applies its own renaming,
fusing (experts) and tying, so its report equals the one for loading the values.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from finetune_trainer.esft.zero3 import undivided_loading
from finetune_trainer.model.weights import TensorFile, saved_tensors, weight_files

Tensors = Mapping[str, torch.Tensor]

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
"""Parts that torch.compile, FSDP, activation checkpointing and DeepSpeed insert anywhere into names of tensors."""
PREFIXES = (*WRAPPERS, "module.", "base_model.model.", "model.", "language_model.")
"""Prefixes that wrappers add to all names: DataParallel's `module.`, PEFT's, and the `model.` of some trainers."""

_MAX_SHOWN = 5
_OTHER_HEADS = re.compile(
    r"(^|\.)(score|classifier|classification_head|v_head|value_head|qa_outputs|seq_relationship|pooler|nsp_cls"
    r"|discriminator_predictions)\."
)
_CAUSAL_MASKS = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$")


@dataclass(frozen=True)
class Match:
    """The result of comparing a checkpoint's tensors with a model's."""

    architecture: str
    missing: tuple[str, ...] = ()
    """Weights of the model that the checkpoint lacks."""
    unexpected: tuple[str, ...] = ()
    """Tensors of the checkpoint that the model does not have."""
    mismatched: tuple[str, ...] = ()
    """Weights whose shapes differ, each with both shapes."""
    key_mapping: dict[str, str] = field(default_factory=dict)
    """The argument `key_mapping` of `from_pretrained`: patterns in the checkpoint's names and their replacements."""
    removed: tuple[str, ...] = ()
    """Parts that the key mapping removes from names, such as `_orig_mod.`."""
    new: tuple[str, ...] = ()
    """Weights of a new head, which the checkpoint may lack."""
    unused: tuple[str, ...] = ()
    """Tensors of a head that the model does not have."""

    @property
    def faults(self) -> int:
        """Return the number of tensors that do not match."""
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)

    def problems(self) -> Iterator[str]:
        """Yield one message per kind of mismatch, with the first five names."""
        if self.missing:
            yield (
                f"the checkpoint lacks {_summarize(self.missing)} of {self.architecture}, which would start from "
                f"random numbers: save the model again with all its weights{_tying_hint(self.missing)}"
            )
        if self.unexpected:
            yield (
                f"the checkpoint holds {_summarize(self.unexpected)} that {self.architecture} has no place for: check "
                "model_type and the sizes in its config.json against the weights"
            )
        if self.mismatched:
            yield f"the checkpoint and its config.json differ in the shape of {_summarize(self.mismatched)}"

    def summary(self) -> str:
        """Return the problems in one line."""
        return "; ".join(self.problems())

    def notes(self) -> Iterator[str]:
        """Yield a line for the job's log for each change of names and heads."""
        if self.removed:
            names = " and ".join(f"`{part}`" for part in self.removed)
            yield f"the checkpoint's names contain {names}, left by a wrapper: removed while loading"
        if self.new:
            yield f"{_summarize(self.new)} of {self.architecture} are new: the checkpoint has no such head"
        if self.unused:
            yield f"{_summarize(self.unused)} of another head in the checkpoint are not used"


_matches: dict[Hashable, Match] = {}


def match_checkpoint(
    name: str, config: PretrainedConfig, auto: Any, revision: str | None = None, new_head: bool = False
) -> Match:
    """Match the weight files of a directory or a hub id as `match_tensors` does; the result is cached in the process.

    Raises:
        OSError: there are no safetensors files.
        SafetensorError: a file is damaged.
    """
    files = tuple(weight_files(name, revision, getattr(config, "transformers_weights", None)))
    state = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    key = state, config.to_json_string(use_diff=False), auto, new_head
    if key not in _matches:
        _matches[key] = match_tensors(saved_tensors(files), config, auto, new_head=new_head)
    return _matches[key]


def match_tensors(tensors: Tensors, config: PretrainedConfig, auto: Any, *, new_head: bool = False) -> Match:
    """Match a checkpoint's tensors with the model of a configuration.

    Names are tried as they are, then without the parts that known wrappers add.

    Args:
        tensors: on the meta device, by their names in the checkpoint.
        auto: transformers' auto class that loads the model, such as `AutoModelForCausalLM`.
        new_head: whether the checkpoint may lack the head, as for a reward model before training.

    Raises:
        ValueError: `auto` has no model of this family.
    """
    best = _match(tensors, config, auto, new_head, ())
    for removed in _candidates(tensors) if best.faults else ():
        found = _match(tensors, config, auto, new_head, removed)
        best = min(best, found, key=lambda one: one.faults)
        if not best.faults:
            break
    return best


def model_on_meta(
    files: Mapping[str, TensorFile], config: PretrainedConfig, auto: Any, match: Match, dtype: Any
) -> PreTrainedModel:
    """Return a checkpoint's model on the meta device, with its dtypes and the conversions that `save_pretrained` uses.

    Args:
        files: the checkpoint's tensors by name.
        dtype: the argument `dtype` of `from_pretrained`.
    """
    tensors = {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in files.items()}
    model, _ = _load_on_meta(_architecture(config, auto), config, tensors, match.key_mapping, dtype=dtype)
    without_mapping(model, match)
    return model


def name_in_model(name: str, removed: tuple[str, ...]) -> str:
    """Return a tensor's name without the parts in `removed`."""
    wrappers = tuple(part for part in removed if part in WRAPPERS)
    return _without(name, wrappers).removeprefix(_prefix(removed))


def without_mapping(model: PreTrainedModel, match: Match) -> None:
    """Make a model that was loaded with a key mapping save its weights under the model's own names.

    transformers keeps the mapping so that it can restore the names in the checkpoint.
    """
    ours = set(match.key_mapping)
    conversions = getattr(model, "_weight_conversions", None) or []
    kept = [one for one in conversions if not ours & set(one.source_patterns)]
    model._weight_conversions = kept  # type: ignore[assignment]  # nn.Module declares tensors and modules alone


def _candidates(tensors: Tensors) -> Iterator[tuple[str, ...]]:
    """Yield sets of parts to remove from names: the wrappers' parts, then one more common prefix each time."""
    removed = tuple(part for part in WRAPPERS if any(part in name for name in tensors))
    names = [_without(name, removed) for name in tensors]
    if removed:
        yield removed
    while (prefix := next((one for one in PREFIXES if all(name.startswith(one) for name in names)), None)) is not None:
        names = [name.removeprefix(prefix) for name in names]
        removed = (*removed, prefix)
        yield removed


def _without(name: str, parts: tuple[str, ...]) -> str:
    for part in parts:
        name = name.replace(part, "")
    return name


def _key_mapping(tensors: Tensors, removed: tuple[str, ...]) -> dict[str, str]:
    """Return patterns that remove the parts. transformers replaces one match per pattern: each repeat needs its own."""
    mapping: dict[str, str] = {}
    for part in removed:
        if part in WRAPPERS:
            for nested in range(max(name.count(part) for name in tensors)):
                mapping["(?:" * nested + re.escape(part) + ")" * nested] = ""
    prefix = _prefix(removed)
    return mapping | ({f"^{re.escape(prefix)}": ""} if prefix else {})


def _prefix(removed: tuple[str, ...]) -> str:
    """Return the prefix that is removed from each name."""
    return "".join(part for part in removed if part not in WRAPPERS)


def _match(tensors: Tensors, config: PretrainedConfig, auto: Any, new_head: bool, removed: tuple[str, ...]) -> Match:
    mapping = _key_mapping(tensors, removed)
    architecture = _architecture(config, auto)
    try:
        model, info = _load_on_meta(architecture, config, tensors, mapping)
    except RuntimeError:  # the shapes of tensors that transformers joins into one weight differ
        return _match_by_saved_names(tensors, config, architecture, removed)
    base = model.base_model_prefix
    missing, new = _split(info["missing_keys"], lambda name: new_head and _is_head(name, base))
    unexpected = [name for name in info["unexpected_keys"] if not _CAUSAL_MASKS.search(name)]
    faults, unused = _split(
        unexpected, lambda name: bool(_OTHER_HEADS.search(name)) or (new_head and _is_head(name, base))
    )
    shapes = sorted(f"{name} ({_shape(saved)} against {_shape(own)})" for name, saved, own in info["mismatched_keys"])
    return Match(architecture.__name__, missing, faults, tuple(shapes), mapping, removed, new, unused)


def _architecture(config: PretrainedConfig, auto: Any) -> type[PreTrainedModel]:
    with torch.device("meta"), undivided_loading():
        return type(auto.from_config(deepcopy(config), trust_remote_code=False))


def _load_on_meta(
    architecture: Any, config: PretrainedConfig, tensors: Tensors, mapping: dict[str, str], **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    with undivided_loading(), _silent_loading():
        loaded: tuple[PreTrainedModel, dict[str, Any]] = architecture.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            key_mapping=mapping or None,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    return loaded


@contextmanager
def _silent_loading() -> Iterator[None]:
    """Keep transformers from logging its table of mismatches and from drawing a progress bar."""
    logger, bars = logging.getLogger("transformers.modeling_utils"), is_progress_bar_enabled()
    logger.disabled, before = True, logger.disabled
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logger.disabled = before
        if bars:
            enable_progress_bar()  # type: ignore[no-untyped-call]


def _match_by_saved_names(
    tensors: Tensors, config: PretrainedConfig, architecture: Any, removed: tuple[str, ...]
) -> Match:
    """Match with the names that `save_pretrained` writes, where each expert has tensors of its own."""
    with torch.device("meta"), undivided_loading():
        model = architecture(config)
    expected = set(revert_weight_conversion(model, model.state_dict()))
    names = {name_in_model(name, removed) for name in tensors}
    missing, unexpected = tuple(sorted(expected - names)), tuple(sorted(names - expected))
    shapes = () if missing or unexpected else ("weights that are joined into one, such as an expert's",)
    return Match(architecture.__name__, missing, unexpected, shapes)


def _is_head(name: str, base: str) -> bool:
    """Return whether a weight is outside of the model's backbone."""
    return not name.startswith(f"{base}.") or ".pooler." in name


def _split(names: Iterable[str], chosen: Callable[[str], bool]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names for which `chosen` is false and those for which it is true, both sorted."""
    ordered = sorted(names, key=dot_natural_key)
    return tuple(one for one in ordered if not chosen(one)), tuple(one for one in ordered if chosen(one))


def _tying_hint(missing: tuple[str, ...]) -> str:
    head = all(name.endswith(("lm_head.weight", "embed_out.weight")) for name in missing)
    return ", or set tie_word_embeddings: true in its config.json if its head is its embedding" if head else ""


def _shape(shape: Any) -> str:
    return str(list(shape))


def _summarize(names: tuple[str, ...]) -> str:
    """Return such as `1 weight (lm_head.weight)` or `7 weights (a, b, c, d, e, ...)`."""
    shown = ", ".join(names[:_MAX_SHOWN]) + (", ..." if len(names) > _MAX_SHOWN else "")
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} ({shown})"
