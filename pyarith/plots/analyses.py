"""Where key heads look, and how MLPs turn operands into the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pyarith.errors import check
from pyarith.plots.style import COLOURS, INK, SMALL, TEXT, ruled, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]

_CURVES = {
    "operand_a": ("cos(MLP input, operand A)", COLOURS[1]),
    "operand_b": ("cos(MLP input, operand B)", COLOURS[2]),
    "answer": ("cos(what the MLP adds, answer)", COLOURS[0]),
}
_ROLES = {  # colours that stay with a role, whatever roles a task has
    "operand_a": COLOURS[1],
    "operand_b": COLOURS[5],
    "operator": COLOURS[0],
    "first": COLOURS[3],
    "special": COLOURS[4],
    "other": "#bbbbbb",
}


class Mass(Protocol):
    """What is drawn of attention; ``AttentionMass`` is one."""

    @property
    def heads(self) -> Sequence[Any]: ...

    @property
    def roles(self) -> Sequence[str]: ...

    @property
    def mean(self) -> Array: ...


class Cosines(Protocol):
    """What is drawn of MLPs; ``MlpCosines`` is one."""

    @property
    def mean(self) -> Mapping[str, Array]: ...

    @property
    def spread(self) -> Mapping[str, Array]: ...

    @property
    def points(self) -> Any: ...


def attention_figure(masses: Mapping[str, Mass], title: str = "") -> Figure:
    """Attention at END per token role as stacked bars, one per head; a panel per entry, below each other.

    Roles that get less than half a percent everywhere are left out of the legend.

    Args:
        masses: panel title (operator) -> an ``AttentionMass``, or anything with its ``heads``, ``roles`` and ``mean``
            [n_chosen, role].
        title: one line above all panels.
    Returns:
        A matplotlib ``Figure`` that belongs to no window.
    Raises:
        InputError: nothing is given, or a mean has another shape.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    check(len(masses) > 0, "masses: expected at least one, got none")
    for name, mass in masses.items():
        expected, shape = (len(mass.heads), len(mass.roles)), np.shape(mass.mean)
        check(shape == expected, f"masses[{name!r}]: expected a mean of shape {expected}, got {shape}")
    counts = [len(mass.heads) for mass in masses.values()]
    height = sum(counts) * 0.3 + 0.55 * len(counts) + 1.3
    figure = Figure(figsize=(7.2, min(max(height, 2.4), 40)), layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title, fontsize=TEXT + 2, color=INK)
    panels = figure.subplots(len(counts), 1, squeeze=False, sharex=True, height_ratios=[c + 0.6 for c in counts])
    shown: dict[str, str] = {}
    for axes, (name, mass) in zip(panels.ravel(), masses.items(), strict=True):
        places, left = np.arange(len(mass.heads)), np.zeros(len(mass.heads))
        for number, role in enumerate(mass.roles):
            share = 100 * np.asarray(mass.mean)[:, number]
            if share.max(initial=0.0) < 0.5:
                continue
            colour = shown.setdefault(role, _ROLES.get(role, COLOURS[(6 + len(shown)) % len(COLOURS)]))
            axes.barh(places, share, left=left, height=0.74, color=colour, edgecolor="white", lw=0.6)
            for place in places[share >= 8]:
                text = f"{share[place]:.0f}"
                middle = left[place] + share[place] / 2
                axes.text(middle, place, text, ha="center", va="center", fontsize=SMALL - 0.5, color=_on(colour))
            left = left + share
        axes.set_yticks(places, [str(head) for head in mass.heads])
        axes.set_ylim(len(places) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_ylabel("head", fontsize=TEXT, color=INK)
        axes.set_title(name, fontsize=TEXT, color=INK, loc="left")
        ruled(axes, "x")
    panels[-1, 0].set_xlabel("mean attention at the last token, %", fontsize=TEXT, color=INK)
    roles = sorted(shown, key=[*_ROLES, *shown].index)
    handles = [Patch(color=shown[role], label=_label(role)) for role in roles]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=SMALL, frameon=False)
    return figure


def _label(role: str) -> str:
    return {"operand_a": "operand A", "operand_b": "operand B"}.get(role, role.replace("_", " "))


def _on(colour: str) -> str:
    """White or ink, whichever can be read on the colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "white"


def cosines_figure(cosines: Mapping[str, Cosines], title: str = "") -> Figure:
    """Cosines at END per layer, mean over prompts with a band of one standard deviation; a panel per entry.

    The start, inflection and end of the answer's curve are marked.

    Args:
        cosines: panel title (operator) -> ``MlpCosines``, or anything with its ``mean``, ``spread`` and ``points``.
        title: one line above all panels.
    Returns:
        A matplotlib ``Figure`` that belongs to no window.
    Raises:
        InputError: nothing is given.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    check(len(cosines) > 0, "cosines: expected at least one, got none")
    columns = min(2, len(cosines))
    rows = -(-len(cosines) // columns)
    figure = Figure(figsize=(max(4.4 * columns, 6.2), 3.0 * rows + 0.8), layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title, fontsize=TEXT + 2, color=INK)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, (name, found) in zip(panels, cosines.items(), strict=False):
        mean, spread, points = found.mean, found.spread, found.points
        layers = np.arange(len(mean["answer"]))
        axes.axhline(0, color=INK, lw=0.8)
        for curve, (label, colour) in _CURVES.items():
            low, high = mean[curve] - spread[curve], mean[curve] + spread[curve]
            axes.fill_between(layers, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(layers, mean[curve], "-o", ms=3.5, lw=1.5, color=colour, label=label)
        words = "answer: flat"
        if points is not None:
            words = "answer: start {}, inflection {}, end {}".format(*points)
            for layer in sorted(set(points)):
                axes.axvline(layer, color=COLOURS[0], lw=0.9, ls=":")
        axes.set_title(f"{name}   {words}", fontsize=TEXT, color=INK, loc="left")
        axes.set_xticks(ticks(len(layers)))
        axes.set_xlabel("layer", fontsize=TEXT, color=INK)
        axes.set_ylabel("cosine at the last token", fontsize=TEXT, color=INK)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.2f}"))
        ruled(axes)
    for axes in panels[len(cosines) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
    return figure
