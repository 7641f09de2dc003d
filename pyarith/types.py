"""Small value types shared by every layer."""

from __future__ import annotations

import re
from typing import NamedTuple

from pyarith.errors import InputError


class Head(NamedTuple):
    """An attention head; compares equal to the tuple ``(layer, head)`` and prints as ``9.6``."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read ``"12.22"`` (layers of any number of digits).

        Raises:
            InputError: ``text`` is not ``LAYER.HEAD``.
        """
        match = re.fullmatch(r"\s*(\d+)\.(\d+)\s*", text)
        if match is None:
            raise InputError(f"head: expected LAYER.HEAD such as '12.22', got {text!r}")
        return cls(int(match[1]), int(match[2]))
