"""For every family, packed loss equals unpacked loss or packing is rejected, as docs/packing.md says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.packing import packed_models
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_trainer.model.document_masks import Form
from finetune_trainer.preflight.packing import Trial
from finetune_trainer.training.packing_probe import Finding, Probe

DOCS = (Path(__file__).parents[2] / "docs" / "packing.md").read_text()
EXACT, MIXED = 1e-5, 1e-4
"""Largest difference of losses if documents are separate, and smallest if they are mixed."""


def documented() -> dict[str, Form | None]:
    """Return each family's form of packing in the table, or None if it is rejected."""
    forms = {**{str(form): form for form in Form}, "refused": None}
    rows = {name: re.search(rf"^\| {name} \| (.*) \|$", DOCS, re.MULTILINE) for name in forms}
    assert all(rows.values())
    return {family: forms[name] for name, row in rows.items() if row for family in re.findall(r"`([^`]+)`", row[1])}


TABLE = documented()


def test_the_table_has_every_family() -> None:
    assert TABLE.keys() == packed_models.FIELDS.keys()


@pytest.mark.parametrize("name", packed_models.FIELDS)
def test_family(name: str) -> None:
    """A family that separates documents has the losses and gradients of single documents; others are rejected."""
    model = packed_models.build(name)
    finding = Probe(model, 2, torch.float32).find()
    assert finding.form == TABLE[name], finding
    if finding.form is None:
        assert re.fullmatch(r"\w+ \([\w.]+\) carries one document into the next", finding.reason)
        return
    (alone, expected), (packed, found) = _with_gradients(model, None), _with_gradients(model, finding)
    assert packed == pytest.approx(alone, abs=EXACT)
    assert torch.allclose(found, expected, atol=EXACT * float(expected.abs().max()))


def _with_gradients(model: Any, finding: Finding | None) -> tuple[float, torch.Tensor]:
    """Return the loss, unpacked or packed in the form of the finding, and the gradient of all weights."""
    model.zero_grad()
    loss = packed_models.loss_alone(model) if finding is None else packed_models.loss_packed(model, finding.form)
    loss.backward()
    grads = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return float(loss.detach()), torch.cat(grads)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["mistral", "opt"])
def test_attention(name: str, attention: str) -> None:
    """The form that the probe finds is valid for the requested attention implementation."""
    model = packed_models.build(name, attn_implementation=attention)
    finding = Probe(model, 2, torch.float32).find()
    with torch.no_grad():
        packed, alone = packed_models.loss_packed(model, finding.form), packed_models.loss_alone(model)
    assert float(packed) == pytest.approx(float(alone), abs=EXACT)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_small_models_of_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preflight's findings on small models of transformers' default configurations agree with the loss.

    It accepts no family that mixes documents, and rejects none that separates them in the collator's rows.
    """
    built: list[Any] = []
    monkeypatch.setattr(Trial, "_model", lambda self, make=Trial._model: built.append(make(self)) or built[-1])
    wrong: dict[str, tuple[Finding, float]] = {}
    tried = 0
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        finding = _found(family)
        if finding is None:
            continue
        tried += 1
        with torch.no_grad():
            apart = abs(float(packed_models.loss_packed(built[-1], finding.form) - packed_models.loss_alone(built[-1])))
        if (apart > EXACT) if finding.form is not None else (apart < MIXED):
            wrong[family] = finding, apart
    assert tried > 150 and not wrong


def _found(family: str) -> Finding | None:
    try:
        config = AutoConfig.for_model(family).get_text_config()
    except Exception:  # a few families have no default configuration
        return None
    return Trial(config, "auto", 2, "cpu").find()
