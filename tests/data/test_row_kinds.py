"""Every kind of row is defined completely, and an unknown kind raises wherever it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from finetune_api.data import DataSpec
from finetune_api.stages import PretrainSpec, RlhfSpec, SftSpec
from finetune_trainer.data import inspect
from finetune_trainer.data.encode import Encoder, Encoding
from finetune_trainer.data.report import Stats
from finetune_trainer.data.row_formats import normalise
from finetune_trainer.data.row_kinds import row_kind

ROW = {"text": "a", "prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}
SPEC = DataSpec.model_validate({"sources": [{"inline": [ROW]}]})


def test_an_unknown_kind_is_not_encoded_as_another_one(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, Encoding("ranking", None))
    with pytest.raises(LookupError, match="unknown kind of rows 'ranking': expected one of preference, prompt, sft"):
        list(encoder.rows([(0, {"prompt": "a", "chosen": "b", "rejected": "c"})], Stats()))


def test_an_unknown_kind_is_not_read_as_another_one(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="ranking"):
        normalise(ROW, SPEC, "ranking")
    with pytest.raises(LookupError, match="ranking"):
        inspect(SPEC, "ranking", "stages[0].x.data", tmp_path)


@pytest.mark.parametrize(
    ("spec", "fields"), [(PretrainSpec, {}), (SftSpec, {}), (RlhfSpec, {"rewards": [{"regex": "a"}]})]
)
def test_the_field_that_limits_rows_is_a_field_of_the_stage(spec: Any, fields: dict[str, Any]) -> None:
    stage = spec.model_validate({"data": SPEC.to_json(), **fields})
    assert row_kind(stage.row_kind).limit_field in {info.alias for info in spec.model_fields.values()}
