"""Build the values that the page shows of a run and its stages, in the order of the page. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from finetune_trainer.progress.formatting import clean, count, duration, number, percent, size
from finetune_trainer.report.collect import Points, RunRecord, StageRecord, is_number
from finetune_trainer.report.plots import Panel
from finetune_trainer.report.text_cleaning import Excerpt, Turn, as_text, excerpt, turns

METRIC_PANELS = 6
KEY_METRICS = 3

_COMMON = {
    "step", "stage", "stages", "title", "total", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "samples",
    "tokens_per_second", "samples_per_second", "mfu", "memory", "memory_reserved", "memory_context", "memory_nccl",
    "seconds", "eta", "step_seconds_median", "step_seconds_max", "slow_node", "slow_factor",
}  # fmt: skip
_TIMING = ("_runtime", "_per_second", "_num_tokens", "_flos", "_preparation_time")
_PREFERRED = (
    "win_rate", "reward", "kl", "bytes_per_token", "accuracies", "accuracy", "perplexity", "margins", "exactMatch",
    "executionAccuracy", "rougeL",
)  # fmt: skip
_MEMORY_COLUMNS = {
    "peak": "memory", "reserved": "memory_reserved", "context": "memory_context", "nccl": "memory_nccl",
}  # fmt: skip
_MEMORY_LABELS = {
    "peak": "Peak of tensors on the device",
    "reserved": "Peak reserved by torch",
    "context": "CUDA context",
    "nccl": "NCCL and later kernels",
}
_DATA_LABELS = {
    "rows": "Rows read",
    "kept": "Rows kept",
    "tokens": "Tokens",
    "trained_tokens": "Tokens with loss",
    "truncated_examples": "Examples truncated",
    "truncated_tokens": "Tokens cut off",
    "dropped": "Rows dropped",
    "dropped_tokens": "Tokens dropped",
    "forms": "Rows by form",
    "longest": "Longest example (tokens)",
    "max_length": "Limit (tokens)",
    "packed_rows": "Rows after packing",
    "packing_efficiency": "Packing efficiency",
    "eval_rows": "Held-out rows",
    "eval_tokens": "Held-out tokens",
    "bytes": "Size",
    "seconds": "Preparation time",
    "tokens_per_second": "Tokens prepared per second",
    "cached": "From the cache",
    "streaming": "Streaming",
}


@dataclass(frozen=True)
class Sample:
    """One prompt with the model's completions before and after the stage; None if missing."""

    prompt: list[Turn]
    before: Excerpt | None
    after: Excerpt | None
    reference: Excerpt | None


def verdict(record: RunRecord) -> str:
    """Return a sentence on how many stages are done, how long they took and which step is current."""
    finished = [stage for stage in record.stages if stage.state == "done"]
    took = duration(sum(stage.seconds or 0.0 for stage in record.stages))
    total = len(record.stages)
    if len(finished) == total:
        return f"{'The stage is' if total == 1 else f'All {total} stages are'} done, after {took} of training."
    current = next((stage for stage in record.stages if stage.state == "unfinished"), None)
    where = f"; {current.layout.title} is at step {current.steps or 0}" if current else ""
    return f"{len(finished)} of {total} stages {'is' if len(finished) == 1 else 'are'} done, after {took}{where}."


def final_losses(record: RunRecord) -> list[tuple[str, str]]:
    """Return each stage's last loss, held-out if known, such as `("sft", "held-out loss 1.23")`."""
    found = []
    for stage in record.stages:
        held_out, trained = _before_after(stage)[1], _last(stage.points("loss"))
        if held_out is not None:
            found.append((clean(stage.layout.title), f"held-out loss {number(held_out)}"))
        elif trained is not None:
            found.append((clean(stage.layout.title), f"loss {number(trained)}"))
    return found


def overview(stage: StageRecord) -> dict[str, str]:
    """Return the stage's row in the pipeline table; a value is empty if it is not known."""
    losses = stage.points("loss")
    return {
        "state": stage.state,
        "steps": "" if not stage.steps else str(stage.steps),
        "time": "" if stage.seconds is None else duration(stage.seconds),
        "tokens": "" if not stage.tokens else count(stage.tokens),
        "loss": _change(losses[0][1] if losses else None, _last(losses)),
        "evaluation": _change(*_before_after(stage)),
        "metrics": " · ".join(f"{name} {value}" for name, value in key_metrics(stage)),
    }


def key_metrics(stage: StageRecord) -> list[tuple[str, str]]:
    """Return the most informative final metrics of the stage's own model, without losses."""
    models = _object(stage.evaluation.get("models"))
    compared = {f"{model}.{name}" for model in models for name in stage.metrics}
    own = [name for name in stage.metrics if name not in compared]
    ranked = [(rank, name) for name in own for rank, part in enumerate(_PREFERRED) if name.endswith(part)]
    return [(clean(name), number(stage.metrics[name])) for _, name in sorted(ranked)[:KEY_METRICS]]


def final_metrics(stage: StageRecord) -> list[tuple[str, str]]:
    """Return every final metric except timings."""
    return [(clean(name), number(value)) for name, value in stage.metrics.items() if not name.endswith(_TIMING)]


def expert_facts(experts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return facts about a stage's experts: how many are trained, and how even their load is."""
    selected, before = _object(experts.get("selected")), _object(experts.get("balance"))
    if not selected and not before:
        return []
    layers = _object(experts.get("token_scores"))
    sizes = [len(_object(scores)) for scores in layers.values()]
    trained = sum(len(ids) for ids in selected.values() if isinstance(ids, list))
    facts = [("Trained experts", f"{trained} of {sum(sizes)} in {len(layers)} layers")]
    after = _object(_object(experts.get("after")).get("balance"))
    means = [value["mean"] for value in (before, after) if is_number(value.get("mean"))]
    facts += [("Tokens measured", count(experts["tokens"]))] if is_number(experts.get("tokens")) else []
    facts += [("Entropy of load (1 is even)", " → ".join(number(mean) for mean in means))] if means else []
    facts += [("Drop in entropy", number(means[0] - means[1]))] if len(means) == 2 else []
    return facts + _largest_drop(_object(before.get("layers")), _object(after.get("layers")))


def _largest_drop(before: dict[Any, Any], after: dict[Any, Any]) -> list[tuple[str, str]]:
    """Return the layer whose entropy of load decreased most."""
    drops = {layer: before[layer] - after[layer] for layer in before if is_number(after.get(layer))}
    if not drops:
        return []
    layer = max(drops, key=lambda name: drops[name])
    return [("Largest drop", f"{number(drops[layer])} in layer {clean(str(layer))}")]


def panels(stage: StageRecord) -> list[Panel]:
    """Return the stage's plots that have points: the common ones, then those of its own metrics."""
    common = [
        Panel("Loss", {"train": stage.points("loss"), "held-out": stage.points("eval_loss")}, may_be_log=True),
        Panel("Learning rate", {"learning rate": stage.points("learning_rate")}, is_noisy=False),
        Panel("Gradient norm", {"gradient norm": stage.points("grad_norm")}, may_be_log=True),
        Panel("Throughput (tokens/s)", {"tokens/s": stage.points("tokens_per_second")}, unit="count"),
        Panel(
            "A worker's own part of a step (s)",
            {"slowest worker": stage.points("step_seconds_max"), "median": stage.points("step_seconds_median")},
        ),
        Panel("MFU", {"MFU": stage.points("mfu")}, unit="share"),
        Panel("Peak memory", _memory_lines(stage), unit="bytes", is_noisy=False),
    ]
    own = [
        Panel(clean(name), {"train": stage.points(name), "held-out": stage.points(f"eval_{name}")})
        for name in _own_metrics(stage)
    ]
    return [panel for panel in common + own[:METRIC_PANELS] if panel.shown]


def _memory_lines(stage: StageRecord) -> dict[str, Points]:
    reserved = stage.points("memory_reserved")
    if not reserved:
        return {"memory": stage.points("memory")}
    return {"tensors": stage.points("memory"), "reserved by torch": reserved}


def memory_facts(stage: StageRecord) -> list[tuple[str, str]]:
    """Return the memory of a worker by part, measured at the end of the stage, else at its last logged step."""
    measured = _object(stage.done.get("memory"))
    logged = {name: _last(stage.points(column)) for name, column in _MEMORY_COLUMNS.items()}
    known: dict[str, Any] = {name: measured.get(name, logged[name]) for name in _MEMORY_COLUMNS}
    labels = _MEMORY_LABELS if is_number(known["reserved"]) else {"peak": "Peak memory of the process"}
    return [(label, size(known[name])) for name, label in labels.items() if is_number(known[name])]


def round_panels(stage: StageRecord) -> list[Panel]:
    """Return the plots of an `online` stage over its rounds, numbered from 1."""
    rounds = [row for row in stage.rounds.get("rounds", []) if isinstance(row, dict) and is_number(row.get("round"))]

    def points(name: str) -> Points:
        return [(int(row["round"]) + 1, row[name]) for row in rounds if is_number(row.get(name))]

    panels = [
        Panel("win rate against the start, by round", {"win rate": points("win_rate")}, axis="round", unit="share"),
        Panel("reward by round", {"drawn to train on": points("reward"), "held-out": points("eval_reward")}, "round"),
        Panel("pairs by round", {"pairs": points("pairs"), "ties": points("ties")}, "round", "count"),
    ]
    return [panel for panel in panels if panel.shown]


def data_summary(data: dict[str, Any]) -> str:
    """Return a summary of truncated and dropped rows; empty if the report has no such counts."""
    if data.get("streaming") or not is_number(data.get("truncated_examples")):
        return ""
    dropped = sum(value for value in _counts(data.get("dropped")).values())
    if not data["truncated_examples"] and not dropped:
        return "Nothing was cut off or dropped."
    return " ".join(filter(None, [_truncated(data), _dropped(data, dropped)]))


def data_facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the label and value of every field that is set, known fields first."""
    names = [name for name in _DATA_LABELS if name in data] + [name for name in data if name not in _DATA_LABELS]
    return [(_DATA_LABELS.get(name, clean(name)), _fact(name, data[name])) for name in names if data[name] is not None]


def samples(given: dict[str, Any]) -> list[Sample]:
    """Return the generations before and after the stage, paired if their prompts are the same."""
    before, after = _rows(given.get("before")), _rows(given.get("after"))
    if list(map(_asked, before)) == list(map(_asked, after)):
        pairs: Iterable[tuple[Any, Any]] = zip(before, after, strict=True)
    else:
        pairs = [*zip_longest(before, []), *zip_longest([], after)]
    return [_sample(old or {}, new or {}) for old, new in pairs]


def transport(stage: StageRecord) -> dict[str, str]:
    """Return the transport between the GPUs of several nodes (`words`) and why it is slow (`warning`), if known."""
    found = _object(stage.done.get("transport"))
    return {name: str(found.get(name, "")) for name in ("words", "warning")} if found.get("words") else {}


def environment(record: RunRecord) -> list[tuple[str, str]]:
    """Return the versions that the stages ran with; several if they differ."""
    seen: dict[str, dict[str, None]] = {}
    for stage in record.stages:
        for name, value in _object(stage.done.get("environment")).items():
            seen.setdefault(clean(str(name)), {})[clean(as_text(value))] = None
    return [(name, ", ".join(values)) for name, values in seen.items()]


def _own_metrics(stage: StageRecord) -> list[str]:
    logged = dict.fromkeys(name for row in stage.rows for name in row if not name.endswith(_TIMING))
    names = dict.fromkeys(name.removeprefix("eval_") for name in logged if name not in _COMMON)
    curves = [name for name in names if name not in _COMMON and _is_curve(stage, name)]
    return sorted(curves, key=lambda name: not name.endswith(_PREFERRED))


def _is_curve(stage: StageRecord, name: str) -> bool:
    return max(len(stage.points(name)), len(stage.points(f"eval_{name}"))) > 1


def _before_after(stage: StageRecord) -> tuple[float | None, float | None]:
    points = stage.points("eval_loss")
    last = stage.metrics.get("eval_loss", _last(points))
    return (points[0][1] if len(points) > 1 else None), last


def _change(first: float | None, last: float | None) -> str:
    if last is None:
        return ""
    return number(last) if first is None else f"{number(first)} → {number(last)}"


def _last(points: Points) -> float | None:
    return points[-1][1] if points else None


def _truncated(data: dict[str, Any]) -> str:
    examples, rows = data["truncated_examples"], data.get("rows")
    if not examples:
        return ""
    of_rows = f" of {count(rows)} ({percent(examples / rows)})" if is_number(rows) and rows else ""
    tokens = data.get("truncated_tokens")
    return f"{count(examples)}{of_rows} examples were cut{f' by {count(tokens)} tokens in all' if tokens else ''}."


def _dropped(data: dict[str, Any], dropped: float) -> str:
    reasons = ", ".join(f"{count(number)} {clean(reason)}" for reason, number in _counts(data.get("dropped")).items())
    return f"{count(dropped)} rows were dropped: {reasons}." if dropped else ""


def _counts(value: Any) -> dict[str, float]:
    return {str(name): number for name, number in _object(value).items() if is_number(number) and number}


def _fact(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_number(value):
        shapes = {"seconds": duration, "bytes": size, "packing_efficiency": percent, "tokens_per_second": count}
        return shapes.get(name, _grouped)(value)
    if isinstance(value, dict):
        return ", ".join(f"{clean(str(key))}: {_fact('', member)}" for key, member in value.items()) or "none"
    return clean(as_text(value))


def _grouped(value: float) -> str:
    return f"{value:,}".replace(",", "\N{THIN SPACE}") if isinstance(value, int) else number(value)


def _rows(value: Any) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _object(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _sample(old: dict[str, Any], new: dict[str, Any]) -> Sample:
    reference = new.get("reference", old.get("reference"))
    prompt = turns(_asked(new or old))
    return Sample(prompt, excerpt(old.get("output")), excerpt(new.get("output")), excerpt(reference))


def _asked(row: dict[str, Any]) -> Any:
    """Return a sample's prompt: the messages of a conversation, or a plain text."""
    return row["messages"] if row.get("messages") else row.get("prompt")
