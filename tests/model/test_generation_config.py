"""A generation configuration that transformers would refuse to save is repaired on loading, or rejected early."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.model.saved_models import configure, make_tokenizer
from transformers import GenerationConfig

from finetune_trainer.errors import UserError
from finetune_trainer.model.config import read_config
from finetune_trainer.model.dry_save import saving_faults
from finetune_trainer.model.generation import generation_fault, read_generation_config, repair_generation
from finetune_trainer.model.load import load_whole

GENERATION = "generation_config.json"

REPAIRED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sampled, as its fields show": ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9}),
    "top_k alone": ({"top_k": 20}, {"do_sample": True, "top_k": 20}),
    "greedy, as it says": ({"do_sample": False, "temperature": 0.9}, {"do_sample": False, "temperature": None}),
    "greedy, as its temperature says": ({"temperature": 0.0, "top_p": 0.9}, {"do_sample": None, "top_p": None}),
    "beams that are none": ({"early_stopping": True, "length_penalty": 2.0}, {"early_stopping": None}),
    "no token pads": ({"pad_token_id": -1}, {"pad_token_id": None}),
    "scores that nothing returns": ({"output_scores": True}, {"output_scores": None}),
    "a cache that is off": ({"use_cache": False, "cache_implementation": "static"}, {"cache_implementation": None}),
}


@pytest.mark.parametrize("case", REPAIRED)
def test_what_has_one_right_value_is_repaired_and_said(case: str) -> None:
    given, expected = REPAIRED[case]
    config = GenerationConfig(**given)
    assert generation_fault(config) is not None
    notes = repair_generation(config)
    assert len(notes) == 1 and notes[0].startswith("generation_config.json: ")
    assert {name: getattr(config, name) for name in expected} == expected
    assert generation_fault(config) is None and not repair_generation(config)


@pytest.mark.parametrize("given", [{}, {"do_sample": True, "temperature": 0.6, "top_k": 20}, {"num_beams": 4}])
def test_a_sound_one_stays_as_it_is(given: dict[str, Any]) -> None:
    config = GenerationConfig(**given)
    before = config.to_dict()
    assert not repair_generation(config) and config.to_dict() == before


def test_a_loaded_model_can_be_saved_after_any_change(llama_dir: Path, tmp_path: Path) -> None:
    directory = configure(shutil.copytree(llama_dir, tmp_path / "model"), GENERATION, temperature=0.9, do_sample=None)
    model = load_whole(str(directory), dtype="auto")
    model.generation_config.pad_token_id = 3
    model.save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.do_sample, saved.temperature, saved.pad_token_id) == (True, 0.9, 3)


def faults(directory: Path) -> list[str]:
    config = read_config(str(directory))
    return list(saving_faults(config, read_generation_config(str(directory), config), make_tokenizer()))


def test_what_can_be_saved_has_no_fault(llama_dir: Path) -> None:
    assert not faults(llama_dir)


def test_a_value_that_is_none_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    directory = configure(shutil.copytree(llama_dir, tmp_path / "model"), GENERATION, cache_implementation="magic")
    with pytest.raises(UserError, match="Invalid `cache_implementation` \\(magic\\)"):
        faults(directory)


def test_what_only_saving_refuses_is_found(llama_dir: Path) -> None:
    config = read_config(str(llama_dir))
    generation = GenerationConfig()
    generation.num_return_sequences = 3
    assert "num_return_sequences" in next(saving_faults(config, generation, None))


def test_a_template_that_can_not_be_a_file_is_found(llama_dir: Path) -> None:
    """Named templates are saved as files with those names."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "x", "with/slash": "y"}
    fault = next(saving_faults(read_config(str(llama_dir)), GenerationConfig(), tokenizer))
    assert fault.startswith("its tokenizer can't be saved: ")


def test_a_configuration_that_can_not_be_written_is_found(llama_dir: Path) -> None:
    config = read_config(str(llama_dir))
    config.extra = {1, 2}  # not JSON
    assert next(saving_faults(config, GenerationConfig(), None)).startswith("its configuration can't be saved: ")
