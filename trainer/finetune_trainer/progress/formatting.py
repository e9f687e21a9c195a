"""Formats numbers and texts for the console, plain lines and the report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from finetune_trainer.progress.reporter import Progress

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PICTURES = 0x2400
_DELETE = 0x7F
_KEY_METRICS = ("reward", "kl")
"""Metrics of reinforcement learning that are more informative than its loss, which is 0 by construction (RLOO)."""


def duration(seconds: float) -> str:
    """Format seconds with at most two units: `0.4 s`, `12 s`, `3 min 20 s`, `2 d 03 h`; `?` if not finite."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02d} h"


def count(value: float) -> str:
    """Format a count with three digits and a decimal prefix: `950`, `12.3 k`, `1.2 M`."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


def size(value: float) -> str:
    """Format bytes with a binary prefix: `512 B`, `1.5 GiB`."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def number(value: float) -> str:
    """Format a number with four significant digits: `2.346`, `0.01234`, `3.0e-05`; integers in full."""
    if not math.isfinite(value) or value == 0 or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return f"{int(value)}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def percent(share: float) -> str:
    """Format a fraction of 1 as a percentage with one decimal: `3.5%`."""
    return f"{100 * share:.1f}%"


def clean(text: str) -> str:
    """Return the text without terminal control sequences.

    Control characters are replaced by their Unicode pictures, and lone surrogates by `?`. Tabs and line feeds are kept;
    a carriage return before a line feed is removed.
    """
    valid = text.replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")
    return _CONTROLS.sub(lambda match: _picture(ord(match.group())), valid)


def named_metrics(metrics: dict[str, float]) -> str:
    """Format metrics with their names, separated by a middle dot, such as `eval_loss 1.234`."""
    return " · ".join(f"{clean(name)} {number(value)}" for name, value in metrics.items())


def evaluation_of(progress: Progress) -> dict[str, float]:
    """Return the metrics of the evaluation after this step; empty if there was none."""
    return {name: value for name, value in (progress.metrics or {}).items() if name.startswith("eval_")}


def step_parts(progress: Progress) -> Iterator[tuple[int, str]]:
    """Yield the parts of a step's line in order, each with its rank. The highest rank is omitted first."""
    yield 0, f"{progress.step}/{progress.total}"
    metrics = progress.metrics or {}
    for name in _KEY_METRICS:
        if name in metrics:
            yield 1, f"{name} {number(metrics[name])}"
    if progress.loss is not None:
        yield 1, f"loss {progress.loss:.4f}"
    if progress.learning_rate is not None:
        yield 4, f"lr {progress.learning_rate:.2e}"
    if progress.grad_norm is not None:
        yield 5, f"grad {number(progress.grad_norm)}"
    if progress.tokens_per_second is not None:
        yield 3, f"{count(progress.tokens_per_second)} tok/s"
    if progress.mfu is not None:
        yield 6, f"MFU {percent(progress.mfu)}"
    if progress.eta is not None:
        yield 2, f"ETA {duration(progress.eta)}"


def _scaled(value: float, base: int, prefixes: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return "?"
    scaled, index = float(value), 0
    while abs(scaled) >= base * 0.9995 and index < len(prefixes) - 1:
        scaled, index = scaled / base, index + 1
    digits = f"{scaled:.0f}" if abs(scaled) >= 100 or scaled == int(scaled) else f"{scaled:.1f}"
    return f"{digits} {prefixes[index]}".rstrip()


def _picture(code: int) -> str:
    if code == _DELETE:
        return "␡"
    return chr(_PICTURES + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"
