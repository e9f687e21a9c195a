"""Read tokenizers and model configurations. Weights, which need slow imports, are in `model.load`."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_api.problems import Problem, did_you_mean
from finetune_trainer.errors import UserError
from finetune_trainer.hub import hub_access
from finetune_trainer.model.composite_families import is_composite
from finetune_trainer.model.custom_code import CONFIG_FILE, TOKENIZER_FILE, custom_code_fault
from finetune_trainer.model.saved_model import root_of
from finetune_trainer.model.source import ModelSource
from finetune_trainer.model.vocabulary import needed_rows


def load_tokenizer(source: ModelSource, where: str = "model") -> PreTrainedTokenizerFast:
    """Return the stage's tokenizer, with a padding token.

    Args:
        where: the field that names the model, for error messages.

    Raises:
        UserError: the stage has no tokenizer, or it can't be read.
        Outage: the hub does not answer.
    """
    if not source.tokenizer:
        raise UserError([Problem("model.tokenizer", "the model has no tokenizer: set it, or add a tokenizer stage")])
    revision = source.revision if source.tokenizer == source.name else None  # the revision is the model's
    tokenizer = _read_tokenizer(source.tokenizer, where, revision)
    if len(tokenizer) == len(tokenizer.all_special_ids):  # transformers returns this where the files are missing
        raise UserError([Problem(where, f"no tokenizer at {source.tokenizer!r}: set model.tokenizer")])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_tokenizer(name: str, where: str, revision: str | None) -> PreTrainedTokenizerFast:
    try:
        with hub_access(name, where, revision):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
            return cast(PreTrainedTokenizerFast, tokenizer)
    except (OSError, ValueError) as error:
        reason = custom_code_fault(name, TOKENIZER_FILE, revision) or custom_code_fault(name, CONFIG_FILE, revision)
        message = f"no tokenizer at {name!r}: {reason or _first_line(error)}"
        raise UserError([Problem(where, message)]) from error


def load_config(source: ModelSource, tokenizer: PreTrainedTokenizerFast | None) -> PretrainedConfig:
    """Return the configuration of the stage's model.

    Raises:
        UserError: the family or a field is unknown, or the configuration can't be read.
        Outage: the hub does not answer.
    """
    if source.config is not None:
        return build_config(source.config, tokenizer)
    assert source.name is not None
    return read_config(root_of(source.name), source.revision)


def read_config(name: str, revision: str | None = None, where: str = "model") -> PretrainedConfig:
    """Return the configuration of a saved model, a directory or a hub id.

    Raises:
        UserError: there is none, it can't be read, or it needs custom code.
        Outage: the hub does not answer.
    """
    try:
        with hub_access(name, where, revision):
            config: PretrainedConfig = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
            return config
    except (OSError, ValueError, StrictDataclassError) as error:
        reason = custom_code_fault(name, CONFIG_FILE, revision) or _first_line(error)
        raise UserError([Problem(where, f"no model at {name!r}: {reason}")]) from error


def build_config(fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None) -> PretrainedConfig:
    """Return the configuration of a job's `model.config`; vocabulary size and special ids come from the tokenizer.

    Raises:
        UserError: `model_type` or a field is unknown, or the vocabulary is smaller than the tokenizer's.
    """
    values = dict(fields)
    family = values.pop("model_type", None)
    if family not in CONFIG_MAPPING_NAMES:
        hint = did_you_mean(str(family), CONFIG_MAPPING_NAMES) if family else ""
        problem = f"unknown model_type {family!r}{hint}" if family else "model_type is required, such as `qwen3`"
        raise UserError([Problem("model.config", problem)])
    if is_composite(CONFIG_MAPPING[family]()):
        hint = _language_model_hint(family)
        message = f"{family} joins a language model with other encoders: build the language model alone{hint}"
        raise UserError([Problem("model.config.model_type", message)])
    unknown = _unknown_fields(family, values)
    if unknown:
        raise UserError(unknown)
    try:
        config = AutoConfig.for_model(family, **(_tokenizer_fields(tokenizer) | values))
    except StrictDataclassError as error:
        raise UserError([Problem("model.config", " ".join(str(error).split()))]) from error
    except (TypeError, ValueError) as error:
        raise UserError([Problem("model.config", _first_line(error))]) from error
    if tokenizer is not None and config.vocab_size < (needed := needed_rows(tokenizer)):
        message = f"{config.vocab_size} is less than the {needed} that the tokenizer's ids need"
        raise UserError([Problem("model.config.vocab_size", message)])
    _require_divisible_heads(config)
    return config


def _language_model_hint(family: str) -> str:
    """Return a hint with the family of a composite model's language model; '' if it is not a separate family."""
    text = CONFIG_MAPPING[family].sub_configs.get("text_config")
    name = getattr(text, "model_type", None)
    return f", such as {name}" if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else ""


def _require_divisible_heads(config: PretrainedConfig) -> None:
    """Check what transformers would only report in the first forward pass."""
    heads, shared = (getattr(config, f"num_{name}_heads", None) for name in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        message = f"{heads} attention heads can't share {shared}: expected a divisor of {heads}"
        raise UserError([Problem("model.config.num_key_value_heads", message)])


def context_length(config: PretrainedConfig) -> int | None:
    """Return the model's maximum number of tokens, or None where its configuration does not state it."""
    value = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(value) if isinstance(value, int) and value > 0 else None


def _tokenizer_fields(tokenizer: PreTrainedTokenizerFast | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    return {
        "vocab_size": needed_rows(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _unknown_fields(family: str, values: dict[str, Any]) -> list[Problem]:
    known = set(AutoConfig.for_model(family).to_dict()) | set(PretrainedConfig().to_dict())
    aliases = getattr(type(AutoConfig.for_model(family)), "attribute_map", {})
    valid = known | set(aliases) | _undeclared_fields(family)
    return [
        Problem("", f"unknown field `{name}` in model.config{did_you_mean(name, valid)}")
        for name in values
        if name not in valid
    ]


def _undeclared_fields(family: str) -> set[str]:
    """Return fields that a family's code reads without declaring them. Published models use them: `head_dim`."""
    code = CONFIG_MAPPING[family].__module__.replace(".configuration_", ".modeling_")
    spec = find_spec(code)
    if spec is None or spec.origin is None:
        return set()
    return set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', Path(spec.origin).read_text(encoding="utf-8")))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
