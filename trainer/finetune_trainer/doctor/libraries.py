"""Checks of optional packages. Pure."""

from __future__ import annotations

from finetune_trainer.doctor.facts import Facts
from finetune_trainer.doctor.finding import Finding, Scope, State
from finetune_trainer.doctor.needs import Needs
from finetune_trainer.plan.vllm_version import REQUIREMENT, TORCH, VERSION, fits_version

KERNELS = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""The package that transformers imports for each `model.attnImplementation`."""


def bitsandbytes(facts: Facts, needs: Needs) -> Finding:
    """Check that bitsandbytes has a library for torch's CUDA, of the same major version (`cextension.py`)."""
    name, package, cuda = "bitsandbytes for CUDA", facts.packages.get("bitsandbytes"), facts.torch.cuda
    found = (
        f"{package.version}, for CUDA {' '.join(facts.bitsandbytes_cudas) or 'none'}" if package else "not installed"
    )
    field = f"{needs.quantized}.quantization"
    if not needs.gpus or not needs.quantized:
        return Finding(name, State.NOT_NEEDED, found, "quantization on GPUs", field=field, scope=Scope.IMAGE)
    major = (cuda or "").partition(".")[0]
    needed = f"a library for CUDA {major or 'of torch'}.x"
    if major and any(version[:2] == major for version in facts.bitsandbytes_cudas):
        return Finding(name, State.OK, found, needed, field=field, scope=Scope.IMAGE)
    remedy = "Install a bitsandbytes that has a library for torch's CUDA, or remove quantization"
    return Finding(name, State.MISSING, found, needed, remedy, field, Scope.IMAGE)


def flash_attention(facts: Facts, needs: Needs) -> Finding:
    """Check that the package of the job's attention kernel is installed and can be imported."""
    field, required = "model.attnImplementation", KERNELS.get(needs.attention)
    if required is None:
        installed = [f"{name} {facts.packages[name].version}" for name in KERNELS.values() if name in facts.packages]
        needed = "model.attnImplementation flash_attention_2 or flash_attention_3"
        return Finding("flash-attn", State.NOT_NEEDED, ", ".join(installed) or "not installed", needed, field=field,
                       scope=Scope.IMAGE)  # fmt: skip
    package = facts.packages.get(required)
    if package is not None and not package.error:
        found = f"{required} {package.version}"
        return Finding("flash-attn", State.OK, found, required, field=field, scope=Scope.IMAGE)
    found = "not installed" if package is None else f"{package.version}, whose import fails: {package.error}"
    remedy = f"Install {required} for this torch and CUDA in the image, or set model.attnImplementation to sdpa"
    return Finding("flash-attn", State.MISSING, found, required, remedy, field, Scope.IMAGE)


def vllm(facts: Facts, needs: Needs) -> Finding:
    """Check vLLM, which generates the completions of RLHF if it is installed; otherwise transformers does."""
    package, field = facts.packages.get("vllm"), f"{needs.vllm}.vllm"
    found = package.version if package else "not installed"
    if not needs.gpus or not needs.vllm:
        return Finding("vLLM", State.NOT_NEEDED, found, "rlhf stages on GPUs", field=field, scope=Scope.IMAGE)
    needed = f"vLLM {VERSION}.*, built for torch {TORCH}"
    if package is None:
        remedy = f"Install '{REQUIREMENT}' in the image, or set vllm to off: transformers is slower"
        return Finding("vLLM", State.WARNING, found, needed, remedy, field, Scope.IMAGE)
    if fits_version(package.version):
        return Finding("vLLM", State.OK, found, needed, field=field, scope=Scope.IMAGE)
    remedy = f"Install '{REQUIREMENT}' in the image, or set vllm to off"
    return Finding("vLLM", State.MISSING, found, needed, remedy, field, Scope.IMAGE)
