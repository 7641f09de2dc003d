"""The loss of a fine-tuning run, step by step, above its learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyarith.errors import check
from pyarith.plots.style import COLOURS, INK, SMALL, TEXT, ruled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = {"task_loss": ("task", COLOURS[1]), "general_loss": ("general data (replay)", COLOURS[3])}


def loss_figure(history: Mapping[str, Any], title: str = "", steps_per_epoch: int | None = None) -> Figure:
    """Mean cross-entropy of each step, faint, with its running mean; the learning rate below.

    Args:
        history: ``task_loss``, ``lr`` and, with replay, ``general_loss`` [step], as in ``TuneResult.history``.
        title: one line above.
        steps_per_epoch: draws a faint line where each epoch ends.
    Returns:
        A matplotlib ``Figure`` that belongs to no window.
    Raises:
        InputError: no step, or columns of other lengths.
    """
    from matplotlib.figure import Figure

    columns = {name: np.asarray(history[name], np.float64) for name in (*_LINES, "lr") if name in history}
    shapes = {name: values.shape for name, values in columns.items()}
    fits = {"task_loss", "lr"} <= set(shapes) and len(set(shapes.values())) == 1 and columns["lr"].ndim == 1
    check(fits and len(columns["lr"]) > 0, f"history: expected task_loss and lr of at least one step, got {shapes}")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title, fontsize=TEXT + 2, color=INK)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    n = len(columns["lr"])
    window = max(1, n // 20)
    drawn = [name for name in _LINES if name in columns and not np.isnan(columns[name]).all()]
    for name in drawn:
        _line(upper, columns[name], window, *_LINES[name])
    upper.set_ylabel("cross-entropy per completion token", fontsize=TEXT, color=INK)
    upper.set_ylim(0, 1.1 * max((float(np.nanmax(columns[name])) for name in drawn), default=1.0) or 1.0)
    upper.legend(fontsize=SMALL, frameon=False)
    lower.plot(np.arange(1, n + 1), columns["lr"], color=INK, lw=1.2)
    lower.set_ylabel("rate", fontsize=TEXT, color=INK)
    lower.set_xlabel("optimizer step", fontsize=TEXT, color=INK)
    lower.set_ylim(0, 1.2 * float(columns["lr"].max()) or 1.0)
    lower.set_xlim(0.5, n + 0.5)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    lower.yaxis.get_offset_text().set_fontsize(SMALL)
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes in (upper, lower):
        ruled(axes)
        for end in range(steps_per_epoch or n, n, steps_per_epoch or n):
            axes.axvline(end + 0.5, color=INK, lw=0.6, ls=":", alpha=0.6)
    return figure


def _line(axes: Axes, values: np.ndarray, window: int, label: str, colour: str) -> None:
    steps = np.arange(1, len(values) + 1)
    if window == 1:
        axes.plot(steps, values, color=colour, lw=1.5, marker="o", ms=3, label=label)
        return
    axes.plot(steps, values, color=colour, lw=0.8, alpha=0.35)
    # each point averages the steps up to it that the window holds
    total = np.concatenate([[0.0], values.cumsum()])
    start = np.maximum(steps - window, 0)
    mean = (total[steps] - total[start]) / (steps - start)
    axes.plot(steps, mean, color=colour, lw=1.6, label=f"{label}, mean of {window} steps")
