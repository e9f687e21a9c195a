"""Find the directory to load: a model, an adapter, or the last result of a job."""

from __future__ import annotations

from pathlib import Path

from finetune_api.problems import did_you_mean
from finetune_trainer.errors import UserError
from finetune_trainer.layout import DONE
from finetune_trainer.model.saved_model import ADAPTER_CONFIG, MODEL_CONFIG, is_result, is_reward_model

_SHOWN = 12


def find_result(path: str) -> Path:
    """Return the directory to load: `path`, its `result`, or that of a job's last finished stage (no reward model).

    Raises:
        UserError: there is no model; the message lists what was found.
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


def _last_finished(job: Path) -> Path:
    stages = sorted(entry for entry in (job / "stages").iterdir() if entry.is_dir())
    loadable = [stage for stage in stages if (stage / DONE).is_file() and _answers(stage / "result")]
    if loadable:
        return loadable[-1] / "result"
    listed = ", ".join(f"stages/{stage.name} ({_state(stage)})" for stage in stages) or "no stage"
    raise UserError(f"{job}: no stage of this job has left a model yet: {listed}")


def _state(stage: Path) -> str:
    if not (stage / DONE).is_file():
        return "not finished"
    if is_reward_model(stage / "result"):
        return "finished, a reward model"
    return "finished" if is_result(stage / "result") else "finished, no model"


def _answers(result: Path) -> bool:
    return is_result(result) and not is_reward_model(result)


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
