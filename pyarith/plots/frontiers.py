"""Gain against retention: what several ways of training win on one task and lose on the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyarith.errors import check
from pyarith.plots.style import COLOURS, INK, SMALL, TEXT, ruled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = "osv^DPX*<>"


def frontier_figure(points: Sequence[Mapping[str, Any]], best: Mapping[str, float], title: str = "") -> Figure:
    """Every run as a point; runs at an arm's best rate are filled, their mean is large.

    The frame holds all of these; runs at other rates that lie outside are counted in a corner.

    Args:
        points: ``arm``, ``rate``, ``seed``, ``gain`` and ``retention`` (changes of accuracy) each, as
            ``Comparison.frontier`` gives.
        best: arm -> its best rate, in the order of the legend.
        title: one line above.
    Returns:
        A matplotlib ``Figure`` that belongs to no window.
    Raises:
        InputError: no points, or an arm without a best rate.
    """
    from matplotlib.figure import Figure

    check(len(points) > 0, "points: expected at least one, got none")
    unknown = sorted({one["arm"] for one in points} - set(best))
    check(not unknown, f"best: expected a rate for every arm, got none for {', '.join(unknown)}")
    figure = Figure(figsize=(7.2, 4.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    if title:
        axes.set_title(title, fontsize=TEXT + 2, color=INK)
    for number, (arm, rate) in enumerate(best.items()):
        colour, mark = COLOURS[number % len(COLOURS)], _MARKS[number % len(_MARKS)]
        own = [one for one in points if one["arm"] == arm]
        for chosen in (False, True):
            some = [one for one in own if (one["rate"] == rate) == chosen]
            x, y = ([100 * one[name] for one in some] for name in ("gain", "retention"))
            face, alpha = (colour, 0.9) if chosen else ("none", 0.5)
            axes.scatter(x, y, s=26, marker=mark, linewidths=0.9, alpha=alpha, facecolors=face, edgecolors=colour)
            if chosen and some:
                label = f"{arm}, rate {rate:g}"
                axes.scatter(
                    [np.mean(x)], [np.mean(y)], s=100, marker=mark, color=colour, edgecolors=INK, label=label, zorder=3
                )
    outside = _frame(axes, points, best)
    if outside:
        words = f"{outside} of {len(points)} runs, at other rates, lie outside"
        axes.text(0.02, 0.03, words, transform=axes.transAxes, fontsize=SMALL, color=INK)
    axes.axhline(0, color=INK, lw=0.8, ls=":")
    axes.axvline(0, color=INK, lw=0.8, ls=":")
    axes.set_xlabel("gain: change of the accuracy trained for, percentage points", fontsize=TEXT, color=INK)
    axes.set_ylabel("retention: change of the other tasks' mean", fontsize=TEXT, color=INK)
    ruled(axes)
    axes.legend(fontsize=SMALL, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _frame(axes: Axes, points: Sequence[Mapping[str, Any]], best: Mapping[str, float]) -> int:
    """Limits around 0 and the runs at best rates; returns how many other runs lie outside."""
    inside = np.ones(len(points), bool)
    for name, limit in (("gain", axes.set_xlim), ("retention", axes.set_ylim)):
        every = np.array([100 * one[name] for one in points])
        known = every[[one["rate"] == best[one["arm"]] for one in points]]
        low, high = min(0.0, float(known.min())), max(0.0, float(known.max()))
        margin = 0.15 * (high - low) + 0.5
        limit(low - margin, high + margin)
        inside &= (every >= low - margin) & (every <= high + margin)
    return int((~inside).sum())
