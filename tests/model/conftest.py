"""Tiny saved models that the tests copy and change."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.model.saved_models import make_model, save


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a dense model with untied embeddings."""
    return save(make_model(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model with four experts per layer, which the checkpoint stores one by one."""
    return save(make_model("qwen3_moe"), tmp_path_factory.mktemp("moe"))
