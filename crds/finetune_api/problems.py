"""A fault in a job, with the field it is about: what every check of ours returns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Problem:
    """One fault. `path` is the field as a user writes it (`stages[1].sft.learningRate`), empty for the job itself."""

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
"""What other tools call a field or value, folded, and our names for it; the first one that is valid counts."""

_LONGEST_NAME = 100


def _folded(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` most likely means: the same but for case and underscores, what another tool calls it
    (TRL, transformers, PEFT, DeepSpeed), or spelt alike (difflib). None where none is near."""
    names = list(valid)
    folded = _folded(name[:_LONGEST_NAME])
    by_folded = {_folded(candidate): candidate for candidate in names}
    if folded in by_folded:
        return by_folded[folded]
    known = [candidate for candidate in OTHER_NAMES.get(folded, ()) if candidate in names]
    if known:
        return known[0]
    close = difflib.get_close_matches(folded, by_folded, n=1, cutoff=0.6)
    return by_folded[close[0]] if close else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`: did you mean `x`?` where a valid name is near, else `; expected one of …`."""
    names = sorted(valid)
    close = nearest(name, names)
    if close is not None:
        return f": did you mean `{close}`?"
    return f"; expected one of {', '.join(names)}" if names else ""
