"""A tokenizer with more ids than embedding rows is rejected, or the embedding gets new rows at the mean of the old."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.model.saved_models import make_model, make_tokenizer, save

from finetune_api.model import ModelSpec
from finetune_trainer.errors import UserError
from finetune_trainer.model.config import build_config, read_config
from finetune_trainer.model.load import JobModel, load_whole
from finetune_trainer.model.vocabulary import added_rows, needed_rows, vocabulary_fault

MORE = ["<new1>", "<new2>"]


def more_tokens() -> object:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MORE})
    return tokenizer


def spec(**fields: object) -> ModelSpec:
    return ModelSpec.model_validate({"path": "model", **fields})


def test_ids_beyond_the_embeddings_are_named(llama_dir: Path) -> None:
    config, tokenizer = read_config(str(llama_dir)), more_tokens()
    fault = vocabulary_fault(spec(), config, tokenizer)
    rows = config.vocab_size
    assert fault is not None and f"have {rows} rows" in fault and f"'<new1>' ({rows}), '<new2>' ({rows + 1})" in fault
    assert "model.resizeEmbeddings: auto" in fault
    assert vocabulary_fault(spec(resizeEmbeddings="auto"), config, tokenizer) is None
    assert vocabulary_fault(spec(), config, make_tokenizer()) is None


def test_a_gap_in_the_ids_counts(llama_dir: Path) -> None:
    """The length of a tokenizer may differ from its highest id, because added tokens may leave a gap."""
    tokenizer, rows = make_tokenizer(), read_config(str(llama_dir)).vocab_size

    class Gapped(type(tokenizer)):  # type: ignore[misc]
        def get_vocab(self) -> dict[str, int]:
            return super().get_vocab() | {"<far>": rows + 100}

    tokenizer.__class__ = Gapped
    assert len(tokenizer) <= rows < needed_rows(tokenizer) == rows + 101
    assert vocabulary_fault(spec(), read_config(str(llama_dir)), tokenizer) is not None
    with pytest.raises(UserError, match=f"{rows} is less than the {rows + 101}"):
        build_config({"model_type": "llama", "vocab_size": rows}, tokenizer)


def test_rows_are_a_multiple(llama_dir: Path) -> None:
    config, tokenizer = read_config(str(llama_dir)), more_tokens()
    assert added_rows(spec(resizeEmbeddings="auto"), config, tokenizer) == 320
    assert added_rows(spec(resizeEmbeddings="auto", padToMultipleOf=1), config, tokenizer) == config.vocab_size + 2
    assert added_rows(spec(), config, tokenizer) is None
    assert added_rows(spec(resizeEmbeddings="auto"), config, make_tokenizer()) is None


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_at_the_mean_of_the_old_and_saved(tied: bool, tmp_path: Path) -> None:
    directory = save(make_model(tie_word_embeddings=tied), tmp_path / "model")
    job = JobModel(spec(resizeEmbeddings="auto"), more_tokens(), str(tmp_path))
    model = load_whole(str(directory), job=job, dtype="auto")
    old = load_whole(str(directory), dtype="auto")
    rows = old.config.vocab_size
    for table, before in (
        (model.get_input_embeddings(), old.get_input_embeddings()),
        (model.get_output_embeddings(), old.get_output_embeddings()),
    ):
        assert table.weight.shape == (320, 32)
        assert torch.equal(table.weight[:rows], before.weight)
        mean = before.weight.mean(0).expand(320 - rows, -1)
        torch.testing.assert_close(table.weight[rows:], mean, atol=1e-4, rtol=0)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    again = load_whole(str(directory), job=job, dtype="auto")
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "saved")
    assert read_config(str(tmp_path / "saved")).vocab_size == 320
    assert load_whole(str(tmp_path / "saved"), dtype="auto").get_input_embeddings().num_embeddings == 320
