"""Tasks by ablated lists of heads, beside the same with other heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pyarith.errors import check
from pyarith.plots.style import INK, SMALL, TEXT, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]

_COLOURS = "RdBu"  # as in the heat maps of effects: lower is red
_UNKNOWN = "#c8c8c8"
_PANELS = {"same_layer": "random heads,\nsame layers", "random": "random heads"}
_CELL = (0.58, 0.27)  # width and height in inches
_LONG = 22  # letters of a name


class Transfer(Protocol):
    """What is drawn; ``TransferResult`` is one."""

    @property
    def tasks(self) -> Sequence[str]: ...

    @property
    def head_lists(self) -> Sequence[str]: ...

    def cell(self, task: str, heads: str) -> Any: ...


def transfer_figure(result: Transfer, title: str = "") -> Figure:
    """Relative drop on initially correct items, task (down) by list of heads (across), in percent.

    The first panel is the lists', one more each control's (mean of its draws), all on one scale. Grey: the intact model
    is never right. Behind each task stands the accuracy of the intact model.

    Args:
        result: a ``TransferResult``, or anything with its ``tasks``, ``head_lists`` and ``cell``.
        title: one line above all panels.
    Returns:
        A matplotlib ``Figure`` that belongs to no window.
    Raises:
        InputError: no tasks or no lists.
    """
    from matplotlib.figure import Figure

    tasks, lists = list(result.tasks), list(result.head_lists)
    check(bool(tasks and lists), f"result: expected tasks and lists of heads, got {len(tasks)} and {len(lists)}")
    cells = [[result.cell(task, name) for name in lists] for task in tasks]
    panels = {"these heads": np.array([[one.relative_drop_correct for one in row] for row in cells])}
    for control, words in _PANELS.items():
        if all(control in one.controls for row in cells for one in row):
            drops = [[one.controls[control].relative_drop_correct for one in row] for row in cells]
            draws = len(drops[0][0])
            panels[f"{words}\n(mean of {draws})"] = np.array([[np.mean(one) for one in row] for row in drops])
    names = [_short(name) for name in lists]
    across = max(_CELL[0], 0.068 * max(map(len, names))) * len(lists)
    width = len(panels) * (across + 0.25) + 2.9
    height = len(tasks) * _CELL[1] + 1.5 + (0.4 if title else 0.0)
    figure = Figure(figsize=(max(width, 5.4), max(height, 2.6)), layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title, fontsize=TEXT + 2, color=INK)
    intact = [100 * row[0].accuracy_intact for row in cells]
    labels = [f"{_short(task)}  {share:.0f}%" for task, share in zip(tasks, intact, strict=True)]
    grid = figure.add_gridspec(1, len(panels) + 1, width_ratios=[across] * len(panels) + [0.14])
    for number, (words, values) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[0, number])
        _panel(axes, 100 * values, words, names)
        axes.set_yticks(range(len(tasks)), labels if number == 0 else [""] * len(tasks))
        if number == 0:
            axes.set_ylabel("task, accuracy of the intact model", fontsize=TEXT, color=INK)
    _scale(figure, figure.add_subplot(grid[0, -1]))
    return figure


def _short(name: str) -> str:
    """A name as plain text: matplotlib would read what stands between two dollar signs as mathematics."""
    text = name if len(name) <= _LONG else name[: _LONG - 3] + "..."
    return text.replace("$", r"\$")


def _panel(axes: Axes, values: Array, words: str, names: list[str]) -> None:
    from matplotlib import colormaps

    colours = colormaps[_COLOURS].with_extremes(bad=_UNKNOWN)
    axes.imshow(values, cmap=colours, vmin=-100, vmax=100, aspect="auto", interpolation="nearest")
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        text = "?" if np.isnan(value) else f"{value:+.0f}" if abs(value) >= 0.5 else "0"
        colour = "white" if abs(value) > 55 else INK
        axes.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=colour)
    for edge in range(1, values.shape[1]):
        axes.axvline(edge - 0.5, color="white", lw=1)
    for edge in range(1, values.shape[0]):
        axes.axhline(edge - 0.5, color="white", lw=1)
    axes.set_title(words, fontsize=TEXT, color=INK)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("list of heads", fontsize=TEXT, color=INK)
    plain(axes)


def _scale(figure: Figure, axes: Axes) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(ScalarMappable(norm=Normalize(-100, 100), cmap=_COLOURS), cax=axes, format="{x:.0f}%")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, colors=INK, length=2)
    bar.set_label("relative drop of the accuracy\non items right in the intact model", fontsize=TEXT, color=INK)
