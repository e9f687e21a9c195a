"""Pre-quantized models are rejected by name if they cannot be trained, and dequantized on request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.model.saved_models import WEIGHTS, changed, configure, logits, make_model, make_tokenizer, save
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from finetune_api.model import ModelSpec
from finetune_trainer.errors import UserError
from finetune_trainer.generation.load import load
from finetune_trainer.generation.merge import merge
from finetune_trainer.model.load import JobModel, load_model, load_whole
from finetune_trainer.model.precision import Precision
from finetune_trainer.model.prequantized import environment_fault, quantization_method, training_fault
from finetune_trainer.model.source import ModelSource

FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The values of MXFP4 (OCP Microscaling Formats 1.0); each 32 of them share a power of two."""


def job_model(directory: Path, cache: Path, **fields: Any) -> JobModel:
    spec = ModelSpec.model_validate({"path": str(directory)} | fields)
    return JobModel(spec, make_tokenizer(), str(cache))


def bnb(source: Path, target: Path, **options: Any) -> Path:
    """Save the model as quantized by bitsandbytes."""
    config = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.float32, trust_remote_code=False
    )
    return save(model, target)


def fp8(source: Path, target: Path) -> tuple[Path, dict[str, Tensor]]:
    """Save the model with FP8 linear layers as DeepSeek and Qwen publish them; return the dequantized weights too."""
    meant: dict[str, Tensor] = {}

    def quantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = dict(tensors)
        for name, weight in tensors.items():
            if "_proj." in name:
                scale = weight.abs().amax() / 448
                found[name] = (weight / scale).to(torch.float8_e4m3fn)
                found[f"{name}_scale_inv"] = scale.reshape(1, 1)
                meant[name] = found[name].float() * scale
        return found

    changed(source, target, quantize)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return configure(target, quantization_config=config), meant


def mxfp4(source: Path, target: Path) -> tuple[Path, dict[str, Tensor]]:
    """Save gpt-oss with MXFP4 experts as published; return the dequantized weights too."""
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
    shutil.copytree(source, target)
    found: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = weight.contiguous()
            continue
        groups = weight.transpose(1, 2).unflatten(-1, (-1, 32))
        exponents = torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True) / 6))
        codes = (groups[..., None] / 2 ** exponents[..., None] - FP4).abs().argmin(-1)
        found[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        found[f"{name}_scales"] = (exponents[..., 0] + 127).to(torch.uint8)
        meant[name] = (FP4[codes] * 2**exponents).flatten(-2).transpose(1, 2)
    save_file(found, target / WEIGHTS, metadata={"format": "pt"})
    return configure(target, quantization_config={"quant_method": "mxfp4"}, dtype="bfloat16"), meant


REFUSED = {
    "bitsandbytes 4-bit": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "set model.dequantize: true"),
    "bitsandbytes 8-bit": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "set model.dequantize: true"),
    "mxfp4": ({"quant_method": "mxfp4"}, "set model.dequantize: true"),
    "fp8": ({"quant_method": "fp8"}, "set model.dequantize: true"),
    "gptq 4-bit": ({"quant_method": "gptq", "bits": 4}, "name the model that it was quantized from"),
    "awq 4-bit": ({"quant_method": "awq", "bits": 4}, "name the model that it was quantized from"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "name the model that it was quantized from"),
    "new-method": ({"quant_method": "new-method"}, "name the model that it was quantized from"),
}


@pytest.mark.parametrize("method", REFUSED)
def test_each_method_is_refused_by_name_with_its_remedy(method: str) -> None:
    found, remedy = REFUSED[method]
    config = AutoConfig.for_model("llama", quantization_config=found)
    assert quantization_method(config) == method
    fault = training_fault(config, dequantize=False)
    assert fault is not None and f"quantized ({method}) and can't be trained" in fault and remedy in fault
    can = "dequantize: true" in remedy
    assert (training_fault(config, dequantize=True) is None) is can


def test_a_plain_model_is_not_refused() -> None:
    config = AutoConfig.for_model("llama")
    assert quantization_method(config) is None and training_fault(config, dequantize=False) is None


def test_inference_names_the_missing_package() -> None:
    config = AutoConfig.for_model("llama", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "optimum" in str(environment_fault(config))
    unknown = AutoConfig.for_model("llama", quantization_config={"quant_method": "new-method"})
    assert str(environment_fault(unknown)).endswith("Unknown quantization type, got new-method")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_dequantized_copy_is_plain_and_keeps_its_name(bits: int, llama_dir: Path, tmp_path: Path) -> None:
    directory = bnb(llama_dir, tmp_path / "bnb", **{f"load_in_{bits}bit": True})
    job = job_model(directory, tmp_path / "cache", dequantize=True)
    model = load_whole(str(directory), job=job, dtype="auto")
    assert model.name_or_path == str(directory), "adapters record the model that the job names"
    assert quantization_method(model.config) is None and type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    original = load_whole(str(llama_dir), dtype="auto")
    difference = (model.model.layers[0].mlp.up_proj.weight - original.model.layers[0].mlp.up_proj.weight).abs()
    assert 0 < difference.max() < (0.03 if bits == 4 else 0.001)
    made = [path for path in (tmp_path / "cache" / "dequantized").iterdir() if path.is_dir()]
    load_whole(str(directory), job=job, dtype="auto")
    assert made == [path for path in (tmp_path / "cache" / "dequantized").iterdir() if path.is_dir()]


@pytest.mark.parametrize("family", ["llama_dir", "moe_dir"])
def test_fp8_is_dequantized_under_the_names_of_the_checkpoint(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(family)
    directory, meant = fp8(source, tmp_path / "fp8")
    model = load_whole(str(directory), job=job_model(directory, tmp_path, dequantize=True), dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / WEIGHTS)
    assert saved.keys() == load_file(source / WEIGHTS).keys()
    assert meant and all(torch.equal(saved[name], weight) for name, weight in meant.items())


def test_mxfp4_is_dequantized_exactly(tmp_path: Path) -> None:
    fields = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16, "intermediate_size": 32}
    source = save(make_model("gpt_oss", **fields), tmp_path / "gpt-oss")
    directory, meant = mxfp4(source, tmp_path / "mxfp4")
    model = load_whole(str(directory), job=job_model(directory, tmp_path, dequantize=True), dtype="auto")
    weights = model.state_dict()
    assert meant and all(torch.equal(weights[name].float(), weight) for name, weight in meant.items())
    assert "quantization_config" not in json.loads((Path(model.config._name_or_path) / "config.json").read_text())


def test_a_checkpoint_that_lacks_weights_is_not_dequantized(llama_dir: Path, tmp_path: Path) -> None:
    directory, _ = fp8(llama_dir, tmp_path / "fp8")
    broken = changed(
        directory, tmp_path / "broken", lambda all: {name: all[name] for name in all if "norm" not in name}
    )
    with pytest.raises(UserError, match="lacks 5 weights"):
        load_whole(str(broken), job=job_model(broken, tmp_path, dequantize=True), dtype="auto")


def test_quantized_weights_serve_inference_as_they_are(llama_dir: Path, tmp_path: Path) -> None:
    directory = bnb(llama_dir, tmp_path / "bnb", load_in_4bit=True)
    source = ModelSource(str(directory), None, None, str(directory))
    plain = Precision(torch.float32, torch.float32, torch.float32)
    job = job_model(directory, tmp_path)
    assert load_model(source, job, plain, trains=False).is_quantized
    with pytest.raises(UserError, match=r"quantized \(bitsandbytes 4-bit\) and can't be trained"):
        load_model(source, job, plain)


def test_an_adapter_of_a_quantized_base_answers_on_it_and_merges_into_a_plain_one(
    llama_dir: Path, tmp_path: Path
) -> None:
    directory = bnb(llama_dir, tmp_path / "bnb", load_in_4bit=True)
    base = load_whole(str(directory), dtype="auto")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    loaded = load(str(tmp_path / "adapter"), device="cpu")
    assert loaded.model.is_quantized
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    merged = load_whole(str(tmp_path / "merged"), dtype="auto")
    assert quantization_method(merged.config) is None
    torch.testing.assert_close(logits(merged), logits(loaded.model), atol=0.02, rtol=0)
