"""What a head carries, by the corruption that moves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyarith.errors import check
from pyarith.stats.clusters import Array, effects_array

FAMILIES = ("operator", "operand_a", "operand_b", "operands")
LABELS = ("none", "operator", "A", "B", "operands", "both")


@dataclass(frozen=True, eq=False)
class HeadTypes:
    """A label for each head.

    Attributes:
        labels: str [n_layers, n_heads], one of ``LABELS``.
        clear: bool [n_layers, n_heads]: no family leaves it open; each one either moves the head, or its whole interval
            lies above the threshold.
        moved: family -> bool [n_layers, n_heads].
    """

    labels: Array
    clear: Array
    moved: dict[str, Array]

    def counts(self) -> dict[str, int]:
        """Heads of each label."""
        return {label: int((self.labels == label).sum()) for label in LABELS}


def head_types(families: Mapping[str, Any], *, threshold: float = -0.05, alpha: float = 0.05) -> HeadTypes:
    """Label heads by the corruption families that move them.

    A family moves a head if high < threshold and p_adjusted < alpha. Then, A, B and S standing for operand_a, operand_b
    and operands (all of them):

        operand side = "A" if A and not B; "B" if B and not A; "operands" if A and B, or S alone; else nothing
        label        = "both" if the operator and the operand side; else whichever it is; "none" if neither

    Args:
        families: family -> what has ``low``, ``high`` and ``p_adjusted`` of one shape: ``Confidence.heads``, or a
            mapping of arrays. At least one of operator, operand_a, operand_b, operands.
        threshold: relative effect that counts as moving; negative.
        alpha: for the adjusted p-values.
    Returns:
        ``HeadTypes``. A family that is not given moves nothing and leaves nothing open; NaN moves nothing and is open.
    Raises:
        InputError: an unknown family, shapes that differ, or a missing array.
    Notes: "A" says that A was seen to move the head and B was not; only ``clear`` says that B does not. Families differ
        in strength, so compare labels only where P_clean(answer) - P_corrupted(answer) is alike.
    """
    unknown = [name for name in families if name not in FAMILIES]
    check(bool(families) and not unknown, f"families: expected some of {FAMILIES}, got {list(families)}")
    moved: dict[str, Array] = {}
    settled: list[Array] = []
    for name, given in families.items():
        low, high, p = (_part(given, part, name) for part in ("low", "high", "p_adjusted"))
        shapes = {low.shape, high.shape, p.shape, *(one.shape for one in moved.values())}
        check(len(shapes) == 1, f"families[{name!r}]: expected arrays of one shape in all families, got {shapes}")
        moved[name] = (high < threshold) & (p < alpha)  # comparisons with NaN are False
        settled.append(moved[name] | (low > threshold))
    none = np.zeros(settled[0].shape, bool)
    operator, a, b, s = (moved.get(name, none) for name in FAMILIES)
    labels = np.full(none.shape, "none", dtype=f"<U{max(map(len, LABELS))}")
    labels[operator] = "operator"
    side = {"A": a & ~b, "B": b & ~a, "operands": (a & b) | (s & ~a & ~b)}
    for label, where in side.items():
        labels[where & ~operator] = label
        labels[where & operator] = "both"
    return HeadTypes(labels, np.logical_and.reduce(settled), moved)


def _part(given: Any, part: str, family: str) -> Array:
    value = given.get(part) if isinstance(given, Mapping) else getattr(given, part, None)
    check(
        value is not None, f"families[{family!r}]: expected {part}, such as in result.confidence(pairs).heads, got none"
    )
    return effects_array(value, f"families[{family!r}].{part}")
