"""What a section of the report is made of, and how numbers and foreign text are put into words.

Blocks hold plain text; the template escapes all of it. Charts are the exception: plotly reads tags in its labels, so
foreign text gets into a figure through ``label`` only.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, ClassVar

from pyarith.tasks.tables import LEXICON

Figure = dict[str, Any]
Cells = Sequence[Sequence[str]]

LONG = 300  # tables with more rows stay folded on paper: the CSV file beside the report holds them


@dataclass(frozen=True)
class Text:
    """A paragraph; ``tone`` is "" or "note"."""

    kind: ClassVar[str] = "text"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure for plotly.js: ``data`` and ``layout``, colours as names of the page's palette (see ``charts``).

    ``says`` describes it in a sentence, for the caption and for those who cannot see it.
    """

    kind: ClassVar[str] = "chart"
    figure: Figure
    says: str


@dataclass(frozen=True)
class Table:
    """Rows of cells, ready to print. The first ``words`` columns are text, the others numbers.

    ``folded``: under a line to open. ``file``: where the same numbers lie in the run directory.
    """

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Cells
    title: str = ""
    words: int = 1
    folded: bool = False
    file: str = ""

    @property
    def long(self) -> bool:
        """Whether it is too long to print."""
        return self.folded and len(self.rows) > LONG


@dataclass(frozen=True)
class Tabs:
    """One panel at a time, all of them on paper: panel name -> blocks; ``by`` says what the names are."""

    kind: ClassVar[str] = "tabs"
    panels: Mapping[str, Sequence[Any]]
    by: str = "operator"


Block = Text | Chart | Table | Tabs


def number(text: Any) -> float:
    """A cell of a CSV file or a value of a record as a float; nothing counts as NaN."""
    return math.nan if text is None or text == "" else float(text)


def _known(value: float, text: str) -> str:
    return "n/a" if math.isnan(value) else text


def percent(value: float, digits: int = 1) -> str:
    """A signed change: ``-42.0%``."""
    return _known(value, f"{100 * value:+.{digits}f}%")


def share(value: float, digits: int = 1) -> str:
    """A part of a whole: ``97.5%``."""
    return _known(value, f"{100 * value:.{digits}f}%")


def signed(value: float, digits: int = 2) -> str:
    """``-6.03``."""
    return _known(value, f"{value:+.{digits}f}")


def plain(value: float, digits: int = 3) -> str:
    """``0.948``."""
    return _known(value, f"{value:.{digits}f}")


def small(value: float) -> str:
    """A p-value or an error: ``0.00042``, ``2.9e-06``."""
    return _known(value, f"{value:.2g}")


def between(low: float, high: float, form: Any = percent) -> str:
    """An interval, empty where there is none."""
    return "" if math.isnan(low) or math.isnan(high) else f"{form(low)} .. {form(high)}"


def count(amount: int, what: str) -> str:
    """``1 prompt``, ``2 prompts``."""
    return f"{amount} {what}" + ("" if amount == 1 else "s")


def moment(text: Any) -> str:
    """A time of a record, ``2026-01-31 12:30 UTC``."""
    return f"{datetime.fromisoformat(str(text)).astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"


def printable(text: Any) -> str:
    r"""Foreign text with what cannot be seen (line ends, direction marks) as ``\n`` and the like."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(text))


def label(text: Any, most: int = 200) -> str:
    """Foreign text for a figure: plotly reads ``<b>``, links and ``&lt;`` in labels, so these are escaped."""
    shown = printable(text)
    shown = shown if len(shown) <= most else shown[: most - 1] + "\u2026"
    return html.escape(shown, quote=False)


def operator_title(sign: str) -> str:
    """``addition +``."""
    name = LEXICON[sign]["G"].strip("[]") if sign in LEXICON else "operator"
    return f"{name} {sign}"
