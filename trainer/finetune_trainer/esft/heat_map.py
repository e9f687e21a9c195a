"""Draw a heat map of expert scores by layer and expert, before and after training, with trained experts marked."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Report = dict[str, Any]
_CELL = 0.16
"""Inches per expert and layer."""


def draw(report: Report, score: str) -> bytes:
    """Return a PNG of the scores in a load report (`esft.load_report`), with a second panel if it has `after`.

    Args:
        score: the scores to show, `token` or `gate`.
    """
    panels = [("before", report), *([("after", report["after"])] if "after" in report else [])]
    tables = [(name, _table(part[f"{score}_scores"])) for name, part in panels]
    layers, experts = tables[0][1].shape
    width = min(max(4.0, experts * _CELL + 1.5), 18.0)
    height = min(max(1.6, layers * _CELL + 0.9), 9.0)
    figure = Figure(figsize=(width, height * len(tables)), layout="constrained")
    most = max(float(table.max()) for _, table in tables) or 1.0
    for axes, (name, table) in zip(np.atleast_1d(figure.subplots(len(tables), 1)), tables, strict=True):
        image = axes.imshow(table, cmap="viridis", vmin=0, vmax=most, aspect="auto", interpolation="nearest")
        _label(axes, report, f"{score} score {name} training", score)
        figure.colorbar(image, ax=axes, shrink=0.9)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def _label(axes: Axes, report: Report, title: str, score: str) -> None:
    numbers = sorted(int(layer) for layer in report[f"{score}_scores"])
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("expert")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("layer")
    step = max(1, len(numbers) // 16)
    axes.set_yticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
    marked = [(expert, numbers.index(int(layer))) for layer, ids in report["selected"].items() for expert in ids]
    if marked:
        columns, rows = zip(*marked, strict=True)
        axes.scatter(columns, rows, s=22, facecolors="none", edgecolors="red", linewidths=1.2)


def _table(scores: dict[str, dict[str, float]]) -> NDArray[np.float64]:
    """Return scores [layers, experts]; experts that a layer lacks are 0."""
    rows = [scores[layer] for layer in sorted(scores, key=int)]
    table = np.zeros((len(rows), max(map(len, rows))))
    for number, row in enumerate(rows):
        for expert, value in row.items():
            table[number, int(expert)] = value
    return table
