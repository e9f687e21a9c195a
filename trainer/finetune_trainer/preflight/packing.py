"""Stages that pack rows for a model that would mix their documents: found on a small model of the same structure."""

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
"""Of a model that is built to be probed: 800 MB, a few seconds."""
SPREAD = 0.6
"""Standard deviation of the small model's weights, in units of 1/sqrt(input width): documents that mix show clearly."""
VERSION = 2
"""Raised when the probe changes, so that no older finding is read from the cache."""
LIBRARIES = ("torch", "transformers", "kernels", "flash-attn", "causal-conv1d", "mamba-ssm", "flash-linear-attention")
"""What decides how packed rows are treated, besides the configuration. The kernels need not be installed."""


def packing_problems(run: RunConfig, config: PretrainedConfig, accelerator: bool) -> Iterator[Problem]:
    """Yield a problem for each stage that packs rows for a model that does not keep their documents apart.

    What can't be tried here (a family that can't be built small, a kernel that needs another device) is no problem:
    the workers check the real model before its first step (`training.packing_check`).

    Args:
        config: of the job's model.
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
    """Packed rows tried on a small model with the structure of a configuration.

    Args:
        attention: the job's `attnImplementation`.
        rows: packed rows in a batch.
    """

    config: PretrainedConfig
    attention: str
    rows: int
    device: str

    def cached(self, directory: Path) -> Finding | None:
        """Return what `find` returns, from a file of the directory where it is known."""
        path = directory / f"{self._key()}.json"
        if path.exists():
            known = json.loads(path.read_text())
            return Finding(**known | {"form": known["form"] and Form(known["form"])})
        finding = self.find()
        if finding is not None:
            _write(path, json.dumps(asdict(finding)))
        return finding

    def find(self) -> Finding | None:
        """Return the probe's finding; None where no small model can be built or called here."""
        with torch.random.fork_rng(devices=[]), _quiet():
            model = self._model()
            try:
                return None if model is None else Probe(model, self.rows, torch.float32).find()
            except Exception:  # a kernel that does not work on this device has errors of its own
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
        except Exception:  # the plan has told what is wrong with the configuration
            return None
        for small in small_configs(text):
            try:
                shape = meta_model(small)
                if shape.num_parameters() <= MOST_PARAMETERS and kinds <= _kinds(shape):
                    return self._built(small)
            except Exception:  # fields that don't fit together fail wherever a family's code uses them
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
    """Keep transformers from warning of the small model's configuration, and of kernels that it does without."""
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
    """Write a file at once, because other processes may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=path.parent, delete=False) as part:
        part.write(text)
    os.replace(part.name, path)
