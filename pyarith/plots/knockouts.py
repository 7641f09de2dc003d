"""Knock-out curves: the key heads beside their controls, with the spread of the controls' draws as bands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pyarith.errors import check
from pyarith.plots.style import COLOURS, INK, SMALL, TEXT, ruled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Curve(Protocol):
    """What is drawn; ``KnockoutCurve`` is one."""

    @property
    def ks(self) -> Any: ...

    @property
    def arms(self) -> Mapping[str, Any]: ...

    @property
    def n_prompts(self) -> int: ...

    @property
    def all_ablated(self) -> tuple[float, float]: ...


_ARMS = {
    "key": ("top k: key heads", COLOURS[0], "-", "o"),
    "same_layer": ("random heads of the same layers", COLOURS[3], "-", "s"),
    "random": ("random heads", COLOURS[1], "-", "^"),
    "bottom": ("bottom k", COLOURS[7], "-", "v"),
    "kept": ("all but the top k (only they are kept)", COLOURS[4], "--", "D"),
}


def knockout_figure(curves: Mapping[str, Curve], title: str = "") -> Figure:
    """Accuracy against the number of ablated heads, one panel per entry, two in a row.

    Lines are means over the draws of a control; the band goes from its worst to its best draw.

    Args:
        curves: panel title (operator, task) -> a ``KnockoutCurve``, or anything with its ``ks``, ``arms`` (each with
            ``accuracy`` [draw, k]), ``n_prompts`` and ``all_ablated``.
        title: one line above all panels.
    Returns:
        A matplotlib ``Figure`` that belongs to no window.
    Raises:
        InputError: nothing is given, or an arm's accuracy is not [draw, k].
    """
    from matplotlib.figure import Figure

    check(len(curves) > 0, "curves: expected at least one, got none")
    for name, curve in curves.items():
        for arm, found in curve.arms.items():
            shape = np.shape(found.accuracy)
            fits = len(shape) == 2 and shape[1] == len(curve.ks)
            check(fits, f"curves[{name!r}]: expected accuracy [draw, {len(curve.ks)}] in arm {arm!r}, got {shape}")
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(max(4.6 * columns, 6.2), 3.1 * rows + 1.0), layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title, fontsize=TEXT + 2, color=INK)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, curve) in zip(panels, curves.items(), strict=False):
        _panel(axes, name, curve)
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 + columns, fontsize=SMALL, frameon=False)
    return figure


def _panel(axes: Axes, name: str, curve: Curve) -> None:
    # k is rising and often doubles: places of equal distance keep small k apart
    places = np.arange(len(curve.ks))
    for arm, (label, colour, line, mark) in _ARMS.items():
        if arm not in curve.arms:
            continue
        accuracy = 100 * np.asarray(curve.arms[arm].accuracy, np.float64)
        several = len(accuracy) > 1
        if several:
            axes.fill_between(places, accuracy.min(0), accuracy.max(0), color=colour, alpha=0.18, lw=0)
        text = f"{label} (mean and range of {len(accuracy)} draws)" if several else label
        size = 5 if arm == "key" else 3.5
        axes.plot(places, accuracy.mean(0), line, marker=mark, ms=size, lw=1.5, color=colour, label=text)
    axes.axhline(100 * curve.all_ablated[0], color=INK, lw=0.9, ls=":", label="all heads ablated")
    axes.set_ylim(-4, 104)
    axes.set_xticks(places, [str(k) for k in curve.ks])
    axes.set_xlim(-0.25, max(len(places) - 0.75, 0.25))
    axes.set_xlabel("k, number of heads", fontsize=TEXT, color=INK)
    axes.set_ylabel("accuracy, %", fontsize=TEXT, color=INK)
    axes.set_title(f"{name}   {curve.n_prompts} prompts", fontsize=TEXT, color=INK, loc="left")
    ruled(axes)
