"""Test on a small model of the same structure whether a model keeps the documents of packed rows apart."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.training import TrainingSpec
from finetune_trainer.model.document_masks import Form
from finetune_trainer.model.task import auto_class
from finetune_trainer.model.tiny import small_configs
from finetune_trainer.plan.model_size import meta_model
from finetune_trainer.stage_graph import place
from finetune_trainer.training.packing_probe import Finding, Probe, packed_rows, packing_problem

MOST_PARAMETERS = 200_000_000
"""Maximum number of parameters of the small model: 800 MB in float32, built in a few seconds."""
SPREAD = 0.6
"""Standard deviation of the small model's weights in units of 1/sqrt(input width), enough to detect mixing."""
VERSION = 2
"""Incremented when the probe changes, to invalidate cached findings."""
LIBRARIES = ("torch", "transformers", "kernels", "flash-attn", "causal-conv1d", "mamba-ssm", "flash-linear-attention")
"""Libraries whose versions affect how packed rows are processed. The kernels need not be installed."""


def packing_problems(run: RunConfig, config: PretrainedConfig, accelerator: bool) -> Iterator[Problem]:
    """Yield a problem for each stage that packs rows for a model that does not keep their documents apart.

    A model that can't be tested here (its family can't be built small, or a kernel needs another device) is accepted:
    the workers check the real model before its first step (`training.packing_check`).

    Args:
        config: configuration of the job's model.
        accelerator: whether the job's workers have GPUs.
    """
    device = "cuda" if accelerator and torch.cuda.is_available() else "cpu"
    for index, stage in enumerate(run.job.spec.stages):
        spec = stage.spec
        if isinstance(spec, TrainingSpec) and spec.packs and spec.trains:
            trial = Trial(config, run.job.spec.model.attn_implementation, packed_rows(spec), device)
            finding = trial.cached(Path(run.cache_dir, "packing"))
            if finding is not None and finding.form is None:
                yield packing_problem(place(run, index), config, finding)


@dataclass(frozen=True)
class Trial:
    """A test of packed rows on a small model with the structure of a configuration.

    Args:
        attention: the job's `attnImplementation`.
        rows: number of packed rows in a batch.
    """

    config: PretrainedConfig
    attention: str
    rows: int
    device: str

    def cached(self, directory: Path) -> Finding | None:
        """Return the result of `find`, cached in a file of the directory."""
        path = directory / f"{self._key()}.json"
        if path.exists():
            known = json.loads(path.read_text())
            return Finding(**known | {"form": known["form"] and Form(known["form"])})
        finding = self.find()
        if finding is not None:
            _write(path, json.dumps(asdict(finding)))
        return finding

    def find(self) -> Finding | None:
        """Return the probe's finding; None if no small model can be built or run here."""
        with torch.random.fork_rng(devices=[]), _quiet():
            model = self._model()
            try:
                return None if model is None else Probe(model, self.rows, torch.float32).find()
            except Exception:  # kernels that do not work on this device raise their own error classes
                return None

    def _key(self) -> str:
        fields = {name: value for name, value in self.config.to_dict().items() if not name.startswith("_name")}
        versions = {name: _version(name) for name in LIBRARIES}
        values = [VERSION, fields, self.attention, self.rows, self.device, versions]
        return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()

    def _model(self) -> PreTrainedModel | None:
        """Return a small model with every kind of module of the real one."""
        text = self.config.get_text_config()
        try:
            kinds = _kinds(meta_model(text))
        except Exception:  # the plan reports faults of the configuration
            return None
        for small in small_configs(text):
            try:
                shape = meta_model(small)
                if shape.num_parameters() <= MOST_PARAMETERS and kinds <= _kinds(shape):
                    return self._built(small)
            except Exception:  # inconsistent fields raise any error in the code of the family
                continue
        return None

    def _built(self, config: PretrainedConfig) -> PreTrainedModel:
        options = {} if self.attention == "auto" else {"attn_implementation": self.attention}
        torch.manual_seed(0)
        model: PreTrainedModel = auto_class("causal").from_config(
            config, dtype=torch.float32, trust_remote_code=False, **options
        )
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.data.normal_(0, SPREAD * weight.shape[-1] ** -0.5)
        model.to(self.device)  # type: ignore[arg-type]  # transformers wraps Module.to without its signature
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=self.device), use_cache=False)
        return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' warnings about the small model's configuration and missing kernels."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers has no type for it
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _kinds(model: PreTrainedModel) -> set[type]:
    return {type(module) for module in model.modules()}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    """Write a file atomically, because other processes may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=path.parent, delete=False) as part:
        part.write(text)
    os.replace(part.name, path)
