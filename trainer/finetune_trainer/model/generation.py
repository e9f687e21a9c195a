"""Read a model's generation configuration and repair it where transformers would refuse to save it.

transformers only warns when it reads contradictory fields, but raises when it saves the configuration after a change.
A trainer changes it (the padding token), so without a repair the first checkpoint fails.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from finetune_trainer.errors import UserError

SAMPLING: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Fields that only affect sampling, each with its neutral value."""
BEAMS: dict[str, Any] = {"early_stopping": False, "length_penalty": 1.0}
"""Fields that only affect beam search, each with its neutral value."""


def read_generation_config(name: str, config: PretrainedConfig, revision: str | None = None) -> GenerationConfig:
    """Return a saved model's generation configuration: its own file's, or the one derived from its `config.json`.

    Raises:
        UserError: a field has a value that transformers refuses.
    """
    try:
        return GenerationConfig.from_pretrained(name, revision=revision or "main")
    except OSError:  # there is none
        return GenerationConfig.from_model_config(config)
    except (ValueError, TypeError) as error:
        raise UserError(f"its generation_config.json is invalid: {_first_line(error)}: correct the file") from error


def repair_generation(config: GenerationConfig) -> list[str]:
    """Repair contradictory fields in place; return a line for the job's log for each change.

    If sampling fields are set without `do_sample`, it becomes true unless the temperature is 0. Fields without effect,
    such as a temperature with `do_sample: false`, are removed.
    """
    notes = _repair_sampling(config)
    if config.num_beams in (None, 1):
        notes += _unset(config, BEAMS, "without several beams")
    if config.pad_token_id is not None and config.pad_token_id < 0:
        notes += _unset(config, {"pad_token_id": None}, "as no token has this id")
    if config.use_cache is False:
        notes += _unset(config, {"cache_implementation": None, "cache_config": None}, "with use_cache: false")
    if config.return_dict_in_generate is not True:
        flags = dict.fromkeys(config.extra_output_flags, False)
        notes += _unset(config, flags, "without return_dict_in_generate")
    return notes


def generation_fault(config: GenerationConfig) -> str | None:
    """Return why transformers would refuse to save a configuration after a change, or None."""
    try:
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        return " ".join(str(error).split())
    return None


def _repair_sampling(config: GenerationConfig) -> list[str]:
    effective = _effective_fields(config, SAMPLING)
    if not effective or config.do_sample is True:
        return []
    if config.do_sample is None and config.temperature != 0:
        config.do_sample = True
        return [f"generation_config.json: do_sample is set to true, as {_listed(effective)} is set for sampling"]
    reason = "as a temperature of 0 is greedy" if config.temperature == 0 else "with do_sample: false"
    return _unset(config, SAMPLING, reason)


def _unset(config: GenerationConfig, fields: dict[str, Any], reason: str) -> list[str]:
    effective = _effective_fields(config, fields)
    for name in effective:
        setattr(config, name, None)
    return [f"generation_config.json: {_listed(effective)} is removed: it has no effect {reason}"] if effective else []


def _effective_fields(config: GenerationConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are set to another value than the neutral one."""
    values = {name: getattr(config, name, None) for name in fields}
    return {name: value for name, value in values.items() if value is not None and value != fields[name]}


def _listed(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in fields.items())


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
