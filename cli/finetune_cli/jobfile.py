"""Read a job file as a RunConfig: strict YAML, overrides, and a report of all problems at once."""

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
    """A YAML loader with the rules of Kubernetes: `1e-4` is a number, and duplicate keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key `{key}`", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key, str) else id(key))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> object:
    """Parse one YAML value.

    Raises:
        yaml.YAMLError: the text is not valid YAML.
    """
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def read_job(path: Path, assignments: list[str]) -> FineTuneJob:
    """Return the job in a file, with `--set` assignments applied.

    Raises:
        UserError: the file cannot be read, is not valid YAML, or the job is invalid: one problem each.
    """
    data = _read(path)
    if assignments:
        if not isinstance(data, dict):
            raise UserError(
                [Problem(str(path), "does not contain a job: expected a mapping with apiVersion, kind and spec")]
            )
        try:
            data = apply_overrides(data, assignments, parse_yaml)
        except (ValueError, yaml.YAMLError) as error:
            raise UserError([Problem("--set", str(error).split("\n")[0])]) from error
    job, problems = check_job(data)
    if job is None or problems:
        raise UserError(problems)
    return job


def run_config(job: FineTuneJob, path: Path, assignments: list[str]) -> RunConfig:
    """Return the RunConfig of a job file on this machine.

    A relative storage path starts at the current directory, relative data paths at the directory of the job file.
    """
    storage = job.spec.storage
    base = storage.uri.rstrip("/") if storage.uri else str(Path(storage.path or "runs").expanduser().absolute())
    return RunConfig.model_validate(
        {
            "job": job.to_json(),
            "root": f"{base}/{job.metadata.name}",
            "baseDir": str(path.absolute().parent),
            "workDir": str(Path.cwd()),
            "cacheDir": str(cache_dir()),
            "overrides": assigned_fields(assignments),
        }
    )


def cache_dir() -> Path:
    """Return the directory for prepared data and downloads: FINETUNE_CACHE, or the cache directory of the user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(base, "finetune")).expanduser().absolute()


def _read(path: Path) -> object:
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError([Problem(str(path), "no such file")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError([Problem(str(path), f"cannot be read: {error}")]) from error
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError([Problem(str(path), "is not valid YAML: " + " ".join(str(error).split()))]) from error
