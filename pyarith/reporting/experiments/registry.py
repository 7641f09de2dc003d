"""What an experiment is. The experiments themselves stand in modules of their own, listed in ``__init__``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyarith.reporting.experiments.subject import Subject

Results = dict[str, Any]


def _no_figures(record: Results) -> Mapping[str, Figure]:
    return {}


@dataclass(frozen=True)
class Experiment:
    """One experiment: how it is run, and how its record becomes a section of the page.

    Args:
        name: ``"E5"``.
        title: of its section.
        question: what it asks, one sentence.
        paper: what the paper reports for LLaMA2-7B; read second-hand, see the page's head.
        settings: everything that can change a number; ``n`` and ``seed`` may be set by the caller.
        quick: what replaces some of these to see that everything runs.
        run: (subject, settings) -> results that JSON holds.
        short: record -> one line for the page's table.
        section: record -> paragraphs: tables, then a list of what follows from the numbers. Nothing in them may be
            true of one run only: what depends on a number is worded from that number.
        figures: record -> file name -> picture, drawn from the record alone.
        needs_also: compares with further models, which the caller must give.
    """

    name: str
    title: str
    question: str
    paper: str
    settings: Mapping[str, Any]
    quick: Mapping[str, Any]
    run: Callable[[Subject, Mapping[str, Any]], Results]
    short: Callable[[Results], str]
    section: Callable[[Results], list[str]]
    figures: Callable[[Results], Mapping[str, Figure]] = field(default=_no_figures)
    needs_also: bool = False

    def chosen(self, *, quick: bool = False, n: int | None = None, seed: int | None = None) -> dict[str, Any]:
        """The settings of one run."""
        found = {**self.settings, **(self.quick if quick else {})}
        found |= {} if n is None else {"n": n}
        found |= {} if seed is None else {"seed": seed}
        return found
