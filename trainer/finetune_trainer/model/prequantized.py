"""Handle saved models whose weights are already quantized (`quantization_config` in their config.json).

Such weights can only be used for inference: optimizers, merging and other quantizations need plain tensors. Where
transformers can dequantize them, a job can train a dequantized copy, which is made once per machine.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from finetune_trainer.errors import UserError
from finetune_trainer.esft.zero3 import undivided_loading
from finetune_trainer.model.weights import SHARD_SIZE, weight_files


def quantization_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return the `quantization_config` that a model was saved with, or None."""
    found = getattr(config, "quantization_config", None)
    found = found or getattr(config.get_text_config(), "quantization_config", None)
    if found is None or isinstance(found, dict):
        return found
    return dict(found.to_dict())


def quantization_method(config: PretrainedConfig) -> str | None:
    """Return the quantization of a saved model, such as `bitsandbytes 4-bit` or `mxfp4`, or None."""
    found = quantization_of(config)
    if found is None:
        return None
    method = str(getattr(found.get("quant_method"), "value", found.get("quant_method") or "an unknown method"))
    if method == "bitsandbytes":
        return f"{method} {4 if found.get('load_in_4bit') else 8}-bit"
    return f"{method} {found['bits']}-bit" if found.get("bits") else method


def training_fault(config: PretrainedConfig, dequantize: bool) -> str | None:
    """Return why quantized weights keep a saved model from being trained, merged or requantized, or None."""
    method = quantization_method(config)
    if method is None:
        return None
    original = "name the model that it was quantized from"
    supported = _can_dequantize(config)
    if dequantize:
        return (
            None
            if supported is True
            else f"transformers can't dequantize its {method} weights{_explanation(supported)}: {original}"
        )
    remedy = f"set model.dequantize: true to train a dequantized copy, or {original}" if supported is True else original
    return f"its weights are quantized ({method}) and can't be trained: {remedy}"


def environment_fault(config: PretrainedConfig) -> str | None:
    """Return why a saved model's quantized weights can't be loaded (a missing package, an unknown method), or None.

    A missing accelerator is not reported: another machine may load the model.
    """
    try:
        quantizer = _quantizer(config)
        with suppress(RuntimeError, ValueError, TypeError):
            quantizer.validate_environment(device_map=None, weights_only=True)  # type: ignore[no-untyped-call]
    except (ImportError, ValueError, TypeError) as error:
        return f"its weights are quantized ({quantization_method(config)}) and can't be loaded: {_reason(error)}"
    return None


def dequantized(name: str, directory: Path, revision: str | None = None) -> str:
    """Return the place of a model's dequantized copy below `directory`, made there once on this machine.

    Raises:
        UserError: transformers can't dequantize it, or the checkpoint lacks weights.
    """
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    if fault := training_fault(config, dequantize=True):
        raise UserError(f"{name}: {fault}")
    path = directory / _key(name, config, revision)
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_dir():
            partial = path.with_name(f".{path.name}")
            shutil.rmtree(partial, ignore_errors=True)
            _load_plain(name, config, revision).save_pretrained(partial, max_shard_size=SHARD_SIZE)
            partial.rename(path)
    return str(path)


def _load_plain(name: str, config: PretrainedConfig, revision: str | None) -> PreTrainedModel:
    at_loading = "dequantize" in _quantizer(config).get_load_operations()
    if at_loading:
        config.quantization_config = (quantization_of(config) or {}) | {"dequantize": True}
    with undivided_loading():
        model, info = _saved_class(config).from_pretrained(
            name,
            revision=revision,
            config=config,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{name}: the checkpoint lacks {len(missing)} weights: {', '.join(missing[:5])}")
    plain: PreTrainedModel = model if at_loading else model.dequantize()
    # Without the quantizer's conversions, the copy is saved under the family's own names.
    plain._weight_conversions = None  # type: ignore[assignment]  # nn.Module declares tensors and modules alone
    return plain


def _saved_class(config: PretrainedConfig) -> Any:
    names = config.architectures or [""]
    return getattr(transformers, names[0], AutoModelForCausalLM)


def _quantizer(config: PretrainedConfig) -> HfQuantizer:
    settings = quantization_of(config)
    assert settings is not None
    quantizer: HfQuantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    return quantizer


def _can_dequantize(config: PretrainedConfig) -> bool | Exception:
    """Whether transformers can; the error where a package that it needs for that is not installed."""
    try:
        quantizer = _quantizer(config)
    except (ImportError, ValueError, TypeError) as error:
        return error
    overridden = type(quantizer)._dequantize is not HfQuantizer._dequantize
    return overridden or "dequantize" in quantizer.get_load_operations()


def _explanation(supported: bool | Exception) -> str:
    return f" ({_reason(supported)})" if isinstance(supported, Exception) else ""


def _reason(error: Exception) -> str:
    """Return an error's first line, without the list of all methods that transformers knows."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].partition(" - supported types")[0]


def _key(name: str, config: PretrainedConfig, revision: str | None) -> str:
    """Return a key that changes with the weight files: their paths, sizes and modification times."""
    files = weight_files(name, revision, getattr(config, "transformers_weights", None))
    found = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:32]
