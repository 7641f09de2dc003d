"""How far a run is: a bar on a terminal, the caller's function, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from pyarith.errors import InputTypeError, check

Progress = bool | Callable[[int, int], None] | None


def check_progress(progress: Any) -> None:
    """Raise InputTypeError unless it is None, a bool or a function."""
    check(
        progress is None or isinstance(progress, bool) or callable(progress),
        f"progress: expected None, False or a callable (done, total), got {type(progress).__name__}",
        InputTypeError,
    )


class Bar:
    """The bar, or the caller's function, or nothing, as long as a ``with`` block lasts.

    Args:
        progress: None = a bar on a terminal, True = a bar, False = nothing, or a callable ``(done, total)``.
        total: what is to be done.
        unit, name: for the bar.
    """

    def __init__(self, progress: Progress, total: int, unit: str, name: str) -> None:
        self._total, self._unit, self._name = total, unit, name
        self._function = progress if callable(progress) else None
        self._show = progress is True or (progress is None and sys.stderr.isatty())
        self._bar: Any = None

    def __enter__(self) -> Bar:
        if self._show:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=self._total, unit=self._unit, desc=self._name)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def call(self, done: int, before: int = 0) -> None:
        """So much is done, counted from ``before``."""
        done += before
        if self._function is not None:
            self._function(done, self._total)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def after(self, before: int) -> Callable[[int, int], None]:
        """A progress function for a part of the work that begins when ``before`` is done."""
        return lambda done, _: self.call(done, before)
