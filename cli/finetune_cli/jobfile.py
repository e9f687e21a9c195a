"""A job file as a RunConfig: YAML read strictly, overrides applied, every fault told at once."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from finetune_api.job import FineTuneJob
from finetune_api.overrides import apply_overrides, assigned_fields
from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.validation import check_job
from finetune_trainer.errors import UserError

CACHE_VARIABLE = "FINETUNE_CACHE"


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes reads it: `1e-4` is a number, and a key appears once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"`{key}` is given twice", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key, str) else id(key))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> object:
    """One YAML value.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def read_job(path: Path, assignments: list[str]) -> FineTuneJob:
    """The job in a file, with `--set` assignments applied.

    Raises:
        UserError: the file can't be read, isn't YAML, or the job has faults: one problem for each.
    """
    data = _read(path)
    if assignments:
        if not isinstance(data, dict):
            raise UserError([Problem(str(path), "holds no job: expected a mapping with apiVersion, kind and spec")])
        try:
            data = apply_overrides(data, assignments, parse_yaml)
        except (ValueError, yaml.YAMLError) as error:
            raise UserError([Problem("--set", str(error).split("\n")[0])]) from error
    job, problems = check_job(data)
    if job is None or problems:
        raise UserError(problems)
    return job


def run_config(job: FineTuneJob, path: Path, assignments: list[str]) -> RunConfig:
    """A job file's RunConfig on this machine: storage below the current directory, data beside the file."""
    storage = job.spec.storage
    place = storage.uri.rstrip("/") if storage.uri else str(Path(storage.path or "runs").expanduser().absolute())
    return RunConfig.model_validate(
        {
            "job": job.to_json(),
            "root": f"{place}/{job.metadata.name}",
            "baseDir": str(path.absolute().parent),
            "workDir": str(Path.cwd()),
            "cacheDir": str(cache_dir()),
            "overrides": assigned_fields(assignments),
        }
    )


def cache_dir() -> Path:
    """Where prepared data and downloads go: FINETUNE_CACHE, or the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(base, "finetune")).expanduser().absolute()


def _read(path: Path) -> object:
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError([Problem(str(path), "no such file")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError([Problem(str(path), f"can't be read: {error}")]) from error
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError([Problem(str(path), "is not YAML: " + " ".join(str(error).split()))]) from error
