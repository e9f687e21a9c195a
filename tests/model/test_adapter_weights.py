"""An adapter file with missing or extra weights is rejected instead of loading as an adapter without effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.model.saved_models import logits
from torch import Tensor

from finetune_trainer.errors import UserError
from finetune_trainer.model.adapter import ADAPTER_WEIGHTS, attach_adapter
from finetune_trainer.model.load import load_whole


@pytest.fixture
def adapter_dir(llama_dir: Path, tmp_path: Path) -> Path:
    """Save an adapter on two kinds of layers with a fully trained head."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(load_whole(str(llama_dir), dtype="auto"), config)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_a_whole_adapter_is_attached_as_peft_does(llama_dir: Path, adapter_dir: Path) -> None:
    from peft import PeftModel

    ours = attach_adapter(load_whole(str(llama_dir), dtype="auto"), adapter_dir, trainable=True)
    theirs = PeftModel.from_pretrained(load_whole(str(llama_dir), dtype="auto"), str(adapter_dir), is_trainable=True)
    assert torch.equal(logits(ours), logits(theirs))
    trained = [{name for name, one in model.named_parameters() if one.requires_grad} for model in (ours, theirs)]
    assert trained[0] == trained[1]


BROKEN: dict[str, tuple[Callable[[str], str | None], str]] = {
    "a wrapper's prefix": (lambda name: f"module.{name}", "lacks 1 of the adapter's weights: base_model.model.lm_head"),
    "a lost layer": (lambda name: None if "layers.1.self_attn" in name else name, "lacks 2 of the adapter's weights"),
    "a lost module": (lambda name: None if "lm_head" in name else name, "lacks 1 of the adapter's weights: base_model"),
    "another model's layer": (lambda name: name.replace("layers.1.", "layers.7."), "lacks 4 of the adapter's weights"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_adapter_is_refused(broken: str, llama_dir: Path, adapter_dir: Path) -> None:
    rename, message = BROKEN[broken]
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(adapter_dir / ADAPTER_WEIGHTS).items():
        if (new := rename(name)) is not None:
            tensors[new] = tensor
    save_file(tensors, adapter_dir / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        attach_adapter(load_whole(str(llama_dir), dtype="auto"), adapter_dir)
    assert message in str(error.value)


def test_what_the_base_has_no_place_for_is_refused(llama_dir: Path, adapter_dir: Path) -> None:
    tensors = load_file(adapter_dir / ADAPTER_WEIGHTS)
    extra = {
        f"{name.replace('layers.1.', 'layers.7.')}": one.clone() for name, one in tensors.items() if "s.1." in name
    }
    save_file(tensors | extra, adapter_dir / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match="no place for 4 of the adapter's weights"):
        attach_adapter(load_whole(str(llama_dir), dtype="auto"), adapter_dir)


def test_a_pickled_adapter_is_not_loaded(llama_dir: Path, adapter_dir: Path) -> None:
    torch.save(load_file(adapter_dir / ADAPTER_WEIGHTS), adapter_dir / "adapter_model.bin")
    (adapter_dir / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(UserError, match="pickled weights are not loaded"):
        attach_adapter(load_whole(str(llama_dir), dtype="auto"), adapter_dir)
