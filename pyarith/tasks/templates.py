"""Prompt templates with marked slots: the machinery that every task of this package shares.

A template is a text with `{NAME}` slots and parts in square brackets that a corruption may replace.
`Template.render` fills it and says at which characters each slot and the bracket came to lie, so that
token roles and alignment never have to be guessed from the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pyarith.errors import check

Span = tuple[int, int]
_PART = re.compile(r"\{(\w+)\}|\[([^\]]+)\]")


@dataclass(frozen=True)
class Rendered:
    """A filled template: the text and the character spans `[start, end)` of slots and of the operator."""

    text: str
    spans: dict[str, Span]


@dataclass(frozen=True)
class Template:
    """One prompt form.

    Args:
        text: with `{NAME}` slots and the operator in square brackets, at most once.
        name: short and unique within its task, such as `"+/question/3"`.
        style: `"equation"`, `"statement"`, `"question"` or a task's own.
    """

    text: str
    name: str
    style: str

    @property
    def operator(self) -> str:
        """The bracketed text, or an empty string."""
        found = re.search(r"\[([^\]]+)\]", self.text)
        return found[1] if found else ""

    def render(self, values: dict[str, object], operator: str | None = None) -> Rendered:
        """Fill the slots; `operator` replaces the bracketed text.

        Returns:
            The text and spans, by slot name and `"operator"`.
        Raises:
            InputError: a slot has no value.
        """
        out, spans, at, length = [], {}, 0, 0
        for part in _PART.finditer(self.text):
            slot, bracket = part.group(1), part.group(2)
            check(bracket is not None or slot in values, f"template {self.name}: no value for slot {{{slot}}}")
            filling = str(values[slot]) if bracket is None else (bracket if operator is None else operator)
            before = self.text[at : part.start()]
            start = length + len(before)
            length = start + len(filling)
            out += [before, filling]
            spans["operator" if bracket is not None else slot] = (start, length)
            at = part.end()
        out.append(self.text[at:])
        return Rendered("".join(out), spans)
