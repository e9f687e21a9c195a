"""`Problem`: a fault in a job with the path of its field. All checks return problems."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Problem:
    """One fault. `path` is the field (`stages[1].sft.learningRate`), or empty for the job as a whole."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "accumulationsteps": ("gradientAccumulationSteps",),
    "alpha": ("loraAlpha",),
    "attention": ("attnImplementation",),
    "backoff": ("backoffLimit",),
    "batchsize": ("perDeviceTrainBatchSize",),
    "betas": ("adamBeta1",),
    "bf16": ("bfloat16",),
    "blocksize": ("blockSize", "maxLength"),
    "clipgradnorm": ("maxGradNorm",),
    "contextlength": ("maxLength", "blockSize", "modelMaxLength"),
    "dataset": ("data",),
    "datasets": ("data",),
    "deadline": ("activeDeadlineSeconds",),
    "dropout": ("loraDropout",),
    "epochs": ("numTrainEpochs",),
    "epsilon": ("adamEpsilon",),
    "evalbatchsize": ("perDeviceEvalBatchSize",),
    "evaldataset": ("evalData",),
    "fp16": ("float16",),
    "fp32": ("float32",),
    "gpus": ("gpusPerNode",),
    "gradaccum": ("gradientAccumulationSteps",),
    "half": ("float16",),
    "loadin4bit": ("quantization", "bits"),
    "loadin8bit": ("quantization", "bits"),
    "lr": ("learningRate",),
    "lrscheduler": ("lrSchedulerType",),
    "maxseqlen": ("maxLength", "blockSize", "modelMaxLength"),
    "maxseqlength": ("maxLength", "blockSize", "modelMaxLength"),
    "modelname": ("hub",),
    "modelnameorpath": ("hub",),
    "nccltimeout": ("ddpTimeout",),
    "numepochs": ("numTrainEpochs",),
    "outputdir": ("storage", "path"),
    "peft": ("lora",),
    "peftconfig": ("lora",),
    "rank": ("r",),
    "retries": ("backoffLimit",),
    "scheduler": ("lrSchedulerType",),
    "seqlength": ("maxLength", "blockSize", "modelMaxLength"),
    "stage": ("zero",),
    "steps": ("maxSteps",),
    "targets": ("targetModules",),
    "timeout": ("activeDeadlineSeconds",),
    "torchdtype": ("dtype",),
    "traindataset": ("data",),
    "ttl": ("ttlSecondsAfterFinished",),
    "warmup": ("warmupRatio",),
    "workers": ("workersPerNode",),
    "zerostage": ("zero",),
}
"""Names of fields and values in other tools, normalized, and the names of this API. The first valid one is
suggested."""

_LONGEST_NAME = 100


def _normalized(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid name that `name` most likely means, or None.

    It is the same name except for case and underscores, the name of another tool (TRL, transformers, PEFT, DeepSpeed)
    for it, or a similar spelling (difflib).
    """
    names = list(valid)
    normalized = _normalized(name[:_LONGEST_NAME])
    by_normalized = {_normalized(candidate): candidate for candidate in names}
    if normalized in by_normalized:
        return by_normalized[normalized]
    known = [candidate for candidate in OTHER_NAMES.get(normalized, ()) if candidate in names]
    if known:
        return known[0]
    close = difflib.get_close_matches(normalized, by_normalized, n=1, cutoff=0.6)
    return by_normalized[close[0]] if close else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return `: did you mean `x`?` if a valid name is similar, else `; expected one of ...`."""
    names = sorted(valid)
    close = nearest(name, names)
    if close is not None:
        return f": did you mean `{close}`?"
    return f"; expected one of {', '.join(names)}" if names else ""
