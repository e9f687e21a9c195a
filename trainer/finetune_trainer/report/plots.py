"""Draw curves as inline SVG in the page's colours; the same points give the same bytes.

Colours are CSS variables (`--line-1`, `--line-2`, `--faint`) and `currentColor`, so that dark mode needs no second
picture. matplotlib does not support them, so it draws in placeholder colours, which are replaced in its output.
"""

from __future__ import annotations

import html
import io
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from finetune_trainer.progress.formatting import count, number, percent, size
from finetune_trainer.report.collect import Points

SMOOTH_ABOVE = 200
"""A noisy curve with more points gets a smoothed line over its raw points."""
DRAWN_MAX = 2000
"""A curve with more points is split into half as many spans, of which the minimum and the maximum are drawn."""
LOG_RATIO = 100
"""A panel that allows it gets a logarithmic axis if its values are positive and span more than this factor."""

_WIDTH, _HEIGHT = 5.0, 2.5
_TEXT, _FAINT, _LINES = "#010203", "#040506", ("#070809", "#0a0b0c")
_CSS = {_TEXT: "currentColor", _FAINT: "var(--faint)", _LINES[0]: "var(--line-1)", _LINES[1]: "var(--line-2)"}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "axes.edgecolor": _FAINT,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Panel:
    """One plot: a few named curves over steps."""

    title: str
    curves: dict[str, Points] = field(default_factory=dict)
    axis: str = "step"
    """Label of the horizontal axis."""
    unit: str = "number"
    """Number format of the vertical axis: `number`, `count`, `share` or `bytes`."""
    may_be_log: bool = False
    is_noisy: bool = True
    """Whether a long curve is smoothed; a schedule is not, because smoothing bends its corners."""

    @property
    def shown(self) -> dict[str, Points]:
        """The curves that have at least one point."""
        return {name: points for name, points in self.curves.items() if points}


def to_svg(panel: Panel, salt: str) -> str:
    """Return the panel as an `<svg>` element without external references.

    Args:
        panel: the curves.
        salt: unique within a page, so that the ids of two pictures differ.

    Raises:
        ValueError: no curve has a point.
    """
    if not panel.shown:
        raise ValueError(f"panel {panel.title!r} has no points")
    style: Any = _STYLE | {"svg.hashsalt": salt}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        _draw(figure.subplots(), panel)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), panel.title)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the centred moving average over 1/50 of the curve, shape [n]; the window is truncated at the ends."""
    window = np.ones(max(len(values) // 50, 1) | 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def thinned(steps: np.ndarray, values: np.ndarray, most: int = DRAWN_MAX) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `most` of n points: the minimum and the maximum of each of `most / 2` spans."""
    if len(values) <= most:
        return steps, values
    spans = np.array_split(np.arange(len(values)), most // 2)
    kept = np.unique([index for span in spans for index in (span[values[span].argmin()], span[values[span].argmax()])])
    return steps[kept], values[kept]


def _draw(axes: Axes, panel: Panel) -> None:
    for colour, (name, points) in zip(_LINES, panel.shown.items(), strict=False):
        _curve(axes, name, points, colour, panel.is_noisy)
    if panel.may_be_log and _spans_much(panel):
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _LABELS[panel.unit](value)))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.grid(axis="y")
    axes.margins(x=0.02)
    axes.set_xlabel(panel.axis)
    if len(panel.shown) > 1:
        axes.legend(loc="best")


def _curve(axes: Axes, name: str, points: Points, colour: str, is_noisy: bool) -> None:
    steps, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    if is_noisy and len(values) > SMOOTH_ABOVE:
        axes.plot(*thinned(steps, values), color=colour, linewidth=0.6, alpha=0.35)
        axes.plot(*thinned(steps, smoothed(values), 500), color=colour, linewidth=1.6, label=name)
    else:
        marker = "o" if len(values) <= 20 else ""
        axes.plot(*thinned(steps, values), color=colour, linewidth=1.6, label=name, marker=marker, markersize=3)


def _spans_much(panel: Panel) -> bool:
    values = [value for points in panel.shown.values() for _, value in points]
    return min(values) > 0 and max(values) / min(values) > LOG_RATIO


def _inline(svg: str, title: str) -> str:
    body = svg[svg.index("<svg") :]
    for pattern in _unwanted():
        body = pattern.sub("", body)
    for stand_in, colour in _CSS.items():
        body = body.replace(stand_in, colour)
    box = re.search(r'viewBox="[^"]*"', body)
    assert box is not None
    label = f'role="img" aria-label="{html.escape(title)}"'
    opening = f"<svg {box.group()} {label}>"
    return opening + body[body.index(">") + 1 :].strip()


@cache
def _unwanted() -> list[re.Pattern[str]]:
    """Return patterns of what to remove: metadata, styles of the whole page, fonts and ids that repeat in each plot."""
    return [
        re.compile(r"<metadata>.*?</metadata>", re.DOTALL),
        re.compile(r"<style.*?</style>", re.DOTALL),
        re.compile(r"font-family: [^;\"]*;? ?"),
        re.compile(r' id="(?!m[0-9a-f]{10}"|p[0-9a-f]{10}")[^"]*"'),
        re.compile(r"(?m)^\s+"),
    ]


_LABELS = {"number": number, "count": count, "share": percent, "bytes": size}
