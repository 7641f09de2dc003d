"""Numbers of a record in words: percentages, intervals, lists, Markdown tables. None (no number) is ``n/a``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def percent(value: float | None, digits: int = 1) -> str:
    """A share: ``98.5 %``."""
    return "n/a" if value is None else f"{100 * value:.{digits}f} %"


def signed(value: float | None, digits: int = 1) -> str:
    """A change: ``-34.6 %``."""
    return "n/a" if value is None else f"{100 * value:+.{digits}f} %"


def number(value: float | None, form: str = ".2f") -> str:
    """Any number."""
    return "n/a" if value is None else f"{value:{form}}"


def interval(low: float | None, high: float | None, digits: int = 1) -> str:
    """``-38.1 .. -31.5 %``."""
    return "n/a" if low is None or high is None else f"{100 * low:+.{digits}f} .. {100 * high:+.{digits}f} %"


def few(p: float | None) -> str:
    """A p-value."""
    return "n/a" if p is None else f"{p:.2g}"


def count(n: int, what: str) -> str:
    """``1 head``, ``2 heads``."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def listing(items: Iterable[Any], none: str = "none", last: str = "and") -> str:
    """``a, b and c``."""
    texts = [str(item) for item in items]
    if not texts:
        return none
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {last} {texts[-1]}"


def sign(operator: str) -> str:
    """An operator in running text; a bare ``*`` is markup."""
    return f"`{operator}`"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; bars in cells are escaped."""

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    body = [line(row) for row in rows]
    return "\n".join([line(columns), "|" + "---|" * len(columns), *body])


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)
