"""Heat maps of effects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyarith.errors import InputError, check
from pyarith.plots.style import FAINT, INK, SMALL, TEXT, plain, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]
Pair = tuple[Array | None, Array | None]

_COLOURS = "RdBu"  # lower than 0 red, higher blue
_LOWERS, _RAISES, _UNKNOWN = "#c0392b", "#2c6fad", "#c8c8c8"
_PERCENT = "{x:.3g}%"
_MLP_WIDTH = 1.1  # inches
_NUMBERED = 130  # grids of at most this many heads have room for numbers


def effects_figure(
    head_effects: Array | None, mlp_effects: Array | None, title: str = "", threshold: float = -0.05
) -> Figure:
    """Heat map of relative effects, layer (down) by head (across), with the MLPs as bars beside it.

    Colours are symmetric about 0, in percent; heads below ``threshold`` are outlined. Unknown effects (NaN) are grey.

    Args:
        head_effects: [n_layers, n_heads], -0.05 = 5 % lower, or None.
        mlp_effects: [n_layers], or None. They have an axis of their own, since MLPs often move the logit much further.
        title: one line above the picture.
        threshold: below it a head is key.
    Returns:
        A matplotlib ``Figure`` that belongs to no window; ``figure.savefig(path)`` writes it.
    Raises:
        InputError: both are None, or shapes do not fit.
    """
    return _draw({"": (head_effects, mlp_effects)}, title, threshold, columns=1)


def effects_panels(effects: Mapping[str, Pair], title: str = "", threshold: float = -0.05) -> Figure:
    """One heat map per entry (operator, prompt style, model), two in a row, all on one colour scale.

    Args:
        effects: panel title -> (head effects [n_layers, n_heads] or None, MLP effects [n_layers] or None).
        title: one line above all panels.
        threshold: below it a head is key.
    Returns:
        A matplotlib ``Figure``; see `effects_figure`.
    Raises:
        InputError: nothing is given, or shapes do not fit.
    """
    check(len(effects) > 0, "effects: expected at least one panel, got none")
    return _draw(effects, title, threshold, columns=min(2, len(effects)))


def _checked(name: str, heads: Array | None, mlps: Array | None) -> Pair:
    where = f" of panel {name!r}" if name else ""
    if heads is None and mlps is None:
        raise InputError(f"head_effects, mlp_effects{where}: expected at least one of the two, got None for both")
    heads = None if heads is None else np.asarray(heads, np.float64)
    mlps = None if mlps is None else np.asarray(mlps, np.float64)
    if heads is not None:
        fits = heads.ndim == 2 and heads.size > 0
        check(fits, f"head_effects{where}: expected [n_layers, n_heads], got shape {heads.shape}")
    if mlps is not None:
        expected = "n_layers" if heads is None else len(heads)
        fits = mlps.ndim == 1 and mlps.size > 0 and (heads is None or len(mlps) == len(heads))
        check(fits, f"mlp_effects{where}: expected [{expected}], got shape {mlps.shape}")
    return heads, mlps


def _limit(arrays: list[Array]) -> float:
    """The largest magnitude in percent, and 1 where there is none: the end of a symmetric scale."""
    known = [np.abs(array[np.isfinite(array)]) for array in arrays]
    return 100 * max((float(values.max()) for values in known if values.size), default=0.0) or 1.0


def _cell(layers: int, across: int) -> tuple[float, float]:
    """Width and height of one head in inches: large enough for a number in small grids, a picture that fits a page."""
    return min(0.5, max(9.0 / across, 0.11)), min(0.36, max(9.0 / layers, 0.13))


def _draw(effects: Mapping[str, Pair], title: str, threshold: float, columns: int) -> Figure:
    from matplotlib.figure import Figure

    panels = {name: _checked(name, *pair) for name, pair in effects.items()}
    heads = [pair[0] for pair in panels.values() if pair[0] is not None]
    mlps = [pair[1] for pair in panels.values() if pair[1] is not None]
    layers, across = max(map(len, heads + mlps)), max((h.shape[1] for h in heads), default=0)
    cell = _cell(layers, max(across, 1))
    widths = [across * cell[0]] * bool(heads) + [_MLP_WIDTH] * bool(mlps)
    rows = -(-len(panels) // columns)
    width = columns * (sum(widths) + 0.7) + (1.1 if heads else 0.0)
    height = rows * (layers * cell[1] + (1.0 if any(panels) else 0.7)) + (0.4 if title else 0.0)
    figure = Figure(
        figsize=(max(width, 3.4), max(height, 2.6 if heads else 1.6)), layout="constrained", facecolor="white"
    )
    if title:
        figure.suptitle(title, fontsize=TEXT + 2, color=INK)
    ratios = widths * columns + [0.14] * bool(heads)
    grid = figure.add_gridspec(rows, len(ratios), width_ratios=ratios)
    limit, reach = _limit(heads), _limit(mlps)
    for number, (name, (head_effects, mlp_effects)) in enumerate(panels.items()):
        row, column = divmod(number, columns)
        place = column * len(widths)
        first = None
        if heads and head_effects is not None:
            first = figure.add_subplot(grid[row, place])
            _heads(first, head_effects, limit, threshold, cell)
        if mlps and mlp_effects is not None:
            beside = figure.add_subplot(grid[row, place + bool(heads)], sharey=first)
            _mlps(beside, mlp_effects, reach, alone=first is None)
            first = first or beside
        if name:
            first.set_title(name, fontsize=TEXT + 1, color=INK, loc="left")  # type: ignore[union-attr]
    if heads:
        _scale(figure, figure.add_subplot(grid[:, -1]), limit, threshold)
    return figure


def _scale(figure: Figure, axes: Axes, limit: float, threshold: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import StrMethodFormatter

    percent = StrMethodFormatter(_PERCENT)
    bar = figure.colorbar(ScalarMappable(norm=Normalize(-limit, limit), cmap=_COLOURS), cax=axes, format=percent)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, colors=INK, length=2)
    label = "mean relative change\nof the answer's logit"
    if limit > abs(100 * threshold):
        bar.ax.axhline(100 * threshold, color="black", lw=1.2)
        label += f"\noutlined: below {100 * threshold:g}%"
    bar.set_label(label, fontsize=TEXT, color=INK)


def _heads(axes: Axes, effects: Array, limit: float, threshold: float, cell: tuple[float, float]) -> None:
    from matplotlib import colormaps
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    layers, across = effects.shape
    colours = colormaps[_COLOURS].with_extremes(bad=_UNKNOWN)
    axes.imshow(100 * effects, cmap=colours, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    with np.errstate(invalid="ignore"):
        keys = np.argwhere(effects < threshold)
    inset = 0.03
    size = 1 - 2 * inset
    outlines = [Rectangle((head - size / 2, layer - size / 2), size, size) for layer, head in keys]
    line = min(1.6, 9 * min(cell))
    axes.add_collection(
        PatchCollection(outlines, facecolor="none", edgecolor="black", linewidth=line, clip_on=False), autolim=False
    )
    if effects.size <= _NUMBERED:
        for edge in range(1, across):
            axes.axvline(edge - 0.5, color="white", lw=1)
        for edge in range(1, layers):
            axes.axhline(edge - 0.5, color="white", lw=1)
        for layer, head in np.argwhere(np.abs(effects) >= 0.005):
            value = 100 * effects[layer, head]
            bright = abs(value) > 0.5 * limit
            text = f"{value:.0f}" if abs(value) >= 9.5 else f"{value:.1f}"
            colour = "white" if bright else INK
            axes.text(head, layer, text, ha="center", va="center", fontsize=SMALL - 1, color=colour)
    axes.set_xticks(ticks(across))
    axes.set_yticks(ticks(layers))
    axes.set_xlabel("head", fontsize=TEXT, color=INK)
    axes.set_ylabel("layer", fontsize=TEXT, color=INK)
    plain(axes)


def _mlps(axes: Axes, effects: Array, reach: float, alone: bool) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    layers = np.arange(len(effects))
    values = 100 * effects
    axes.barh(layers, np.nan_to_num(values), height=0.72, color=np.where(values < 0, _LOWERS, _RAISES))
    for layer in layers[np.isnan(values)]:
        axes.axhspan(layer - 0.36, layer + 0.36, color=_UNKNOWN, lw=0)
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_xlim(-1.08 * reach, 1.08 * reach)
    axes.set_ylim(len(effects) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(2, symmetric=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter(_PERCENT))
    axes.grid(axis="x", color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("MLP", fontsize=TEXT, color=INK)
    axes.set_yticks(ticks(len(effects)))
    plain(axes)
    if alone:
        axes.set_ylabel("layer", fontsize=TEXT, color=INK)
    else:
        axes.tick_params(axis="y", labelleft=False, length=0)
