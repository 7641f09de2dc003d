"""Colours and sizes that the pictures share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT = "#303030", "#dddddd"
TEXT, SMALL = 9, 7.5
# readable without colour vision (Okabe & Ito), the key heads in the red of the heat maps
COLOURS = ("#c0392b", "#0072b2", "#009e73", "#e69f00", "#7f5aa8", "#56b4e9", "#8c6d31", "#777777")


def ticks(size: int) -> list[int]:
    """Places for at most 20 labels of 0 .. size - 1."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 100, size) if size / step <= 20)
    return list(range(0, size, step))


def plain(axes: Axes) -> None:
    """No frame, small tick labels."""
    axes.tick_params(length=2, labelsize=SMALL, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def ruled(axes: Axes, across: str = "y") -> None:
    """``plain``, with faint lines behind the data."""
    plain(axes)
    axes.grid(axis=across, color=FAINT, lw=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
