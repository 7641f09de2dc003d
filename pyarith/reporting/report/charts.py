"""Figures for plotly.js as plain data.

Colours are names of the page's palette: ``"@c1"`` is the variable ``--c1`` of style.css, ``"@c1/0.2"`` the same with
an opacity, ``"@diverging"`` and ``"@sequential"`` are colour scales. The page puts in what fits a light or dark screen,
or paper. Foreign text comes in through ``blocks.label``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyarith.plots.style import ticks
from pyarith.reporting.report.blocks import Figure

Values = Any  # array-like of floats, NaN where unknown

_NUMBERED = 20  # grids with at most so many columns have room for numbers in the cells
_BAR = 22  # height of a horizontal bar in pixels


def values(array: Values) -> Any:
    """Nested lists with None for NaN, as JSON has none."""
    if isinstance(array, list | tuple | np.ndarray):
        return [values(one) for one in array]
    return float(array) if math.isfinite(array) else None


def reach(*arrays: Values) -> float:
    """The largest magnitude, and 1 where there is none: the end of a symmetric scale."""
    known = [np.abs(a[np.isfinite(a)]) for a in (np.asarray(one, np.float64) for one in arrays)]
    return max((float(one.max()) for one in known if one.size), default=0.0) or 1.0


@dataclass(frozen=True)
class Axis:
    """Names along one side of a grid; ``title`` says what they are."""

    names: Sequence[str]
    title: str = ""

    def drawn(self) -> dict[str, Any]:
        places = ticks(len(self.names))
        axis = {"tickvals": places, "ticktext": [self.names[i] for i in places], "range": [-0.5, len(self.names) - 0.5]}
        return axis | ({"title": {"text": self.title}} if self.title else {})


def numbered(size: int, title: str) -> Axis:
    """0, 1, 2, ..."""
    return Axis([str(i) for i in range(size)], title)


def grid(
    z: Values,
    x: Axis,
    y: Axis,
    hover: Sequence[Sequence[str]],
    *,
    limit: float,
    text: Callable[[float], str] = "{:.0f}".format,
    unit: str = "",
    sequential: bool = False,
    outlined: Sequence[tuple[int, int]] = (),
) -> Figure:
    """A heat map [row, column], rows from the top.

    Args:
        z: the numbers.
        x, y: names of columns and rows.
        hover: what a cell says, [row][column].
        limit: end of the scale, which is symmetric about 0; with ``sequential`` it starts at 0.
        text: a number as it stands in a cell, where there is room.
        unit: of the numbers, behind those of the scale.
        outlined: (row, column) of cells with a frame.
    """
    z = np.asarray(z, np.float64)
    size = min(34.0, max(11.0, 560 / max(len(z), 1)))
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": values(z),
        "zmin": 0 if sequential else -limit,
        "zmax": limit,
        "colorscale": "@sequential" if sequential else "@diverging",
        "hovertext": [list(row) for row in hover],
        "hoverinfo": "text",
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "ticksuffix": unit, "nticks": 5, "xpad": 6},
    }
    if z.shape[1] <= _NUMBERED:
        trace["text"] = [["" if math.isnan(one) else text(one) for one in row] for row in z]
        trace["texttemplate"] = "%{text}"
    frames = [
        {"type": "rect", "x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
        | {"line": {"color": "@ink", "width": 2}}
        for row, column in outlined
    ]
    down = y.drawn()
    down["range"] = down["range"][::-1]
    bare = {"showgrid": False, "zeroline": False}
    layout = {"xaxis": {**x.drawn(), **bare}, "yaxis": {**down, **bare}, "shapes": frames}
    return {"data": [trace], "layout": {**layout, "height": round(size * len(z) + 60)}}


def bars(
    z: Values, y: Axis, hover: Sequence[str], *, unit: str = "", low: Values = None, high: Values = None
) -> Figure:
    """Horizontal bars from the top, red below 0 and blue above, with intervals ``low`` to ``high`` where given."""
    z = np.asarray(z, np.float64)
    trace: dict[str, Any] = {
        "type": "bar",
        "orientation": "h",
        "x": values(z),
        "y": list(range(len(z))),
        "marker": {"color": ["@low" if one < 0 else "@high" for one in z]},
        "hovertext": list(hover),
        "hoverinfo": "text",
        "textposition": "none",
    }
    if low is not None and high is not None:
        up, down = np.asarray(high, np.float64) - z, z - np.asarray(low, np.float64)
        interval = {"type": "data", "symmetric": False, "array": values(up), "arrayminus": values(down)}
        trace["error_x"] = {**interval, "color": "@ink", "thickness": 1.4, "width": 4}
    axis = y.drawn()
    axis["range"] = axis["range"][::-1]
    across = {"ticksuffix": unit, "zeroline": True}
    layout = {"xaxis": across, "yaxis": {**axis, "showgrid": False, "zeroline": False}, "bargap": 0.25}
    return {"data": [trace], "layout": {**layout, "height": _BAR * len(z) + 60}}


@dataclass(frozen=True)
class Line:
    """One curve with its band.

    Attributes:
        name: for the legend.
        y: its values.
        colour: name in the palette.
        hover: what each point says.
        low, high: edges of the band, or None.
        dash, symbol: how it is drawn, for those who cannot tell colours apart.
    """

    name: str
    y: Values
    colour: str
    hover: Sequence[str]
    low: Values = None
    high: Values = None
    dash: str = "solid"
    symbol: str = "circle"


@dataclass(frozen=True)
class Mark:
    """A dotted line across a chart of curves: at a height (``y``) or at a place (``x``), with a word beside it."""

    text: str
    x: float | None = None
    y: float | None = None


def lines(
    curves: Sequence[Line],
    x: Axis,
    *,
    y_title: str = "",
    unit: str = "",
    y_range: tuple[float, float] | None = None,
    marks: Sequence[Mark] = (),
) -> Figure:
    """Curves over named places of equal distance."""
    places = list(range(len(x.names)))
    traces: list[dict[str, Any]] = []
    for curve in curves:
        if curve.low is not None and curve.high is not None:
            edge = {"type": "scatter", "mode": "lines", "x": places, "hoverinfo": "skip", "showlegend": False}
            edge |= {"line": {"width": 1, "color": f"@{curve.colour}/0.45"}, "legendgroup": curve.name}
            shade = {"fill": "tonexty", "fillcolor": f"@{curve.colour}/0.12"}
            traces += [{**edge, "y": values(curve.low)}, {**edge, "y": values(curve.high), **shade}]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": curve.name,
                "legendgroup": curve.name,
                "x": places,
                "y": values(curve.y),
                "line": {"color": f"@{curve.colour}", "width": 2, "dash": curve.dash},
                "marker": {"color": f"@{curve.colour}", "size": 8, "symbol": curve.symbol},
                "hovertext": list(curve.hover),
                "hoverinfo": "text",
            }
        )
    shapes, words = [], []
    for mark in marks:
        at = {"x0": mark.x, "x1": mark.x, "y0": 0, "y1": 1, "yref": "paper"}
        word: dict[str, Any] = {"x": mark.x, "y": 1, "yref": "paper", "yanchor": "bottom"}
        if mark.x is not None:  # no word gets over the edge
            word["xanchor"] = ("left", "center", "right")[min(2, int(3 * mark.x / max(len(places) - 1, 1)))]
        else:
            at = {"x0": 0, "x1": 1, "xref": "paper", "y0": mark.y, "y1": mark.y}
            word = {"x": 1, "xref": "paper", "xanchor": "right", "y": mark.y, "yanchor": "bottom"}
        shapes.append({"type": "line", "line": {"color": "@muted", "width": 1.2, "dash": "dot"}, **at})
        words.append({"text": mark.text, "showarrow": False, "font": {"size": 11, "color": "@muted"}, **word})
    vertical: dict[str, Any] = {"title": {"text": y_title}, "ticksuffix": unit}
    if y_range:
        vertical["range"] = list(y_range)
    across = {**x.drawn(), "range": [-0.3, len(places) - 0.7], "zeroline": False, "showgrid": False}
    layout = {"xaxis": across, "yaxis": vertical, "shapes": shapes, "annotations": words, "height": 380}
    above = 26 if any(mark.x is not None for mark in marks) else 8
    return {"data": traces, "layout": {**layout, "showlegend": True, "margin": {"t": above}}}


@dataclass(frozen=True)
class Part:
    """One share of every stacked bar."""

    name: str
    share: Values
    colour: str
    hover: Sequence[str] = field(default_factory=tuple)


def stacked(parts: Sequence[Part], y: Axis) -> Figure:
    """Horizontal bars to 100 %, a part per colour, rows from the top."""
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part.name,
            "x": values(part.share),
            "y": list(range(len(y.names))),
            "marker": {"color": f"@{part.colour}", "line": {"color": "@page", "width": 1}},
            "hovertext": list(part.hover),
            "hoverinfo": "text",
            "text": ["" if one < 8 else f"{one:.0f}" for one in part.share],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
        }
        for part in parts
    ]
    axis = y.drawn()
    axis["range"] = axis["range"][::-1]
    layout = {"barmode": "stack", "bargap": 0.25, "xaxis": {"range": [0, 100], "ticksuffix": "%", "zeroline": False}}
    layout["yaxis"] = {**axis, "showgrid": False, "zeroline": False}
    return {"data": traces, "layout": {**layout, "height": 28 * len(y.names) + 110, "showlegend": True}}


@dataclass(frozen=True)
class Cloud:
    """Points of one kind: those that count filled and with their mean, the others hollow.

    Attributes:
        name: for the legend.
        x, y: of each point.
        chosen: bool of each.
        colour, symbol: as of a ``Line``.
        hover: what each point says.
    """

    name: str
    x: Values
    y: Values
    chosen: Sequence[bool]
    colour: str
    symbol: str
    hover: Sequence[str]


def scatter(clouds: Sequence[Cloud], *, x_title: str, y_title: str, unit: str = "") -> Figure:
    """Points of several kinds about a cross at 0; the frame holds those that count, the others may lie outside."""
    traces: list[dict[str, Any]] = []
    for cloud in clouds:
        look = {"type": "scatter", "mode": "markers", "legendgroup": cloud.name, "name": cloud.name}
        for chosen in (False, True):
            some = [i for i, one in enumerate(cloud.chosen) if one == chosen]
            symbol = cloud.symbol if chosen else f"{cloud.symbol}-open"
            traces.append(
                {
                    **look,
                    "x": values([cloud.x[i] for i in some]),
                    "y": values([cloud.y[i] for i in some]),
                    "marker": {"color": f"@{cloud.colour}", "symbol": symbol, "size": 7},
                    "hovertext": [cloud.hover[i] for i in some],
                    "hoverinfo": "text",
                    "showlegend": False,
                }
            )
        mean = [float(np.mean([one[i] for i in range(len(one)) if cloud.chosen[i]])) for one in (cloud.x, cloud.y)]
        line = {"color": "@ink", "width": 1.2}
        traces.append(
            {
                **look,
                "x": values(mean[:1]),
                "y": values(mean[1:]),
                "marker": {"color": f"@{cloud.colour}", "symbol": cloud.symbol, "size": 14, "line": line},
                "hovertext": [f"<b>{cloud.name}</b>, mean over seeds<br>{mean[0]:+.1f}{unit} / {mean[1]:+.1f}{unit}"],
                "hoverinfo": "text",
            }
        )
    axes = {}
    for name, title in (("x", x_title), ("y", y_title)):
        known = [v for one in clouds for v, chosen in zip(getattr(one, name), one.chosen, strict=True) if chosen]
        low, high = min(0.0, *known), max(0.0, *known)
        margin = 0.15 * (high - low) + 0.5
        frame = {"range": [low - margin, high + margin], "ticksuffix": unit, "zeroline": True}
        axes[f"{name}axis"] = {"title": {"text": title}, **frame}
    return {"data": traces, "layout": {**axes, "height": 440, "showlegend": True}}
