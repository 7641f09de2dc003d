"""What a section is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyarith.reporting.report.blocks import Block
from pyarith.reporting.report.source import Source


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        id: of its heading, for links.
        title: its heading.
        build: from the run to its blocks. Called only where the step is to be shown.
        step: the step that it needs; empty = the run alone.
        command: of ``pyarith``, which makes the step.
    """

    id: str
    title: str
    build: Callable[[Source], Sequence[Block]]
    step: str = ""
    command: str = ""
