"""Which directory is meant: a model, an adapter, or a job whose last result is wanted."""

from __future__ import annotations

import os
from pathlib import Path

from finetune_api.problems import did_you_mean
from finetune_trainer.errors import UserError
from finetune_trainer.esft.adapter import is_expert_adapter
from finetune_trainer.layout import DONE

MODEL_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_SHOWN = 12


def find_result(path: str) -> Path:
    """The directory to load: `path` itself, its `result`, or the result of a job's last finished stage.

    Raises:
        UserError: there is no model; the message says what is there instead.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise UserError(_not_a_directory(path, directory))
    if is_result(directory):
        return directory.absolute()
    if (directory / "stages").is_dir():
        return _last_finished(directory).absolute()
    if is_result(directory / "result"):
        return (directory / "result").absolute()
    raise UserError(_nothing_to_load(path, directory))


def is_result(directory: Path) -> bool:
    """Whether `directory` holds a saved model or an adapter, of PEFT or of experts."""
    return (directory / MODEL_CONFIG).is_file() or is_adapter(directory) or is_expert_adapter(directory)


def is_adapter(directory: Path) -> bool:
    """Whether `directory` holds an adapter (PEFT) and not a whole model."""
    return (directory / ADAPTER_CONFIG).is_file()


def find_base(adapter: Path, recorded: str) -> str:
    """The base model of `adapter`: as recorded, or, where a job's directory was moved, the same path beside it.

    A recorded path that is no directory is looked for relative to the adapter; an absolute one by its last parts
    (`stages/01-pretrain/result`) below each directory above the adapter. What is found nowhere may be a hub id and is
    returned as it is.

    Raises:
        UserError: an absolute path that is gone.
    """
    candidates = [Path(recorded), adapter / recorded, *_moved(adapter, Path(recorded))]
    found = next((path for path in candidates if is_result(path) and path != adapter), None)
    if found is not None:
        return str(found)
    if os.path.isabs(recorded):
        raise UserError(
            f"{adapter}: its base model {recorded!r} is gone; put it back, "
            f"or write its place into base_model_name_or_path of {ADAPTER_CONFIG}"
        )
    return recorded


def _moved(adapter: Path, recorded: Path) -> list[Path]:
    # A single last part such as `result` would fit too many directories.
    tails = [Path(*recorded.parts[start:]) for start in range(1, len(recorded.parts) - 1)]
    return [above / tail for tail in tails for above in adapter.parents]


def _last_finished(job: Path) -> Path:
    stages = sorted(entry for entry in (job / "stages").iterdir() if entry.is_dir())
    loadable = [stage for stage in stages if (stage / DONE).is_file() and is_result(stage / "result")]
    if loadable:
        return loadable[-1] / "result"
    listed = ", ".join(f"stages/{stage.name} ({_state(stage)})" for stage in stages) or "no stage"
    raise UserError(f"{job}: no stage of this job has left a model yet: {listed}")


def _state(stage: Path) -> str:
    if not (stage / DONE).is_file():
        return "not finished"
    return "finished" if is_result(stage / "result") else "finished, no model"


def _not_a_directory(path: str, directory: Path) -> str:
    if directory.is_file():
        return f"{path!r} is a file: give the directory that holds it"
    siblings = [entry.name for entry in directory.parent.iterdir()] if directory.parent.is_dir() else []
    return f"no directory {path!r}{did_you_mean(directory.name, siblings[:_SHOWN])}"


def _nothing_to_load(path: str, directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    inside = [name for name in names if (directory / name / "stages").is_dir() or is_result(directory / name)]
    listed = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    hint = f"; did you mean {', '.join(repr(str(directory / name)) for name in inside[:_SHOWN])}?" if inside else ""
    expected = f"expected {MODEL_CONFIG} or {ADAPTER_CONFIG}, or a job's directory with stages/"
    return f"{path!r} holds no model: {expected}; found {listed or 'nothing'}{hint}"
