"""Accuracies: an interval for one, tests and an interval for two on the same prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from pyarith.errors import check
from pyarith.stats.bootstrap import bootstrap_mean
from pyarith.stats.clusters import Array, Clusters, check_count, check_level
from pyarith.stats.signs import ALTERNATIVES, sign_flip


@dataclass(frozen=True)
class McNemar:
    """Exact test of paired right / wrong: prompts that only a, and that only b answers rightly."""

    only_a: int
    only_b: int
    p: float


@dataclass(frozen=True)
class AccuracyDifference:
    """Accuracy of a minus accuracy of b on the same prompts, with interval and p-value by clusters."""

    accuracy_a: float
    accuracy_b: float
    estimate: float
    low: float
    high: float
    se: float
    p: float
    level: float
    n_clusters: dict[str, int]
    method: str


def wilson(right: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of an accuracy: (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

    Args:
        right: prompts answered rightly.
        n: prompts.
        level: nominal coverage.
    Returns:
        (low, high), inside 0 .. 1. For independent prompts; crossed ones need ``accuracy_difference`` or
        ``bootstrap_mean`` of the 0/1 values.
    Raises:
        InputError: not 0 <= right <= n, n < 1.
    References: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    check_count(n, "n")
    check_count(right, "right", 0)
    check(right <= n, f"right: expected at most n = {n}, got {right}")
    check_level(level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, share = right / n, z * z / n
    middle = (p + share / 2) / (1 + share)
    reach = z * math.sqrt(p * (1 - p) / n + share / (4 * n)) / (1 + share)
    low = 0.0 if right == 0 else max(0.0, middle - reach)
    high = 1.0 if right == n else min(1.0, middle + reach)
    return low, high


def mcnemar(a: Any, b: Any, *, alternative: str = "two-sided") -> McNemar:
    """Exact McNemar test: of the m prompts where only one is right, is a right in half of them?

    Two-sided p = min(1, 2 P(X <= min(only_a, only_b))), X binomial(m, 1/2); "greater" asks whether a is better:
    P(X >= only_a); "less": P(X <= only_a). In whole numbers, so without rounding before the last division.

    Args:
        a, b: bool [batch], right or wrong on the same prompts.
        alternative: "two-sided", "less" or "greater".
    Returns:
        A ``McNemar``; p = 1 where a and b differ nowhere.
    Raises:
        InputError: shapes differ, or values other than right and wrong.
    Notes: counts every prompt as independent. On prompts that share operand pairs or templates it finds too much: use
        ``accuracy_difference``.
    References: McNemar 1947, doi:10.1007/BF02295996; the exact form: Liddell 1983, doi:10.2307/2987527.
    """
    left, right = _right_or_wrong(a, "a"), _right_or_wrong(b, "b")
    check(left.shape == right.shape, f"b: expected shape {left.shape} like a, got {right.shape}")
    check(alternative in ALTERNATIVES, f"alternative: expected one of {ALTERNATIVES}, got {alternative!r}")
    only_a, only_b = int((left & ~right).sum()), int((right & ~left).sum())
    m = only_a + only_b
    if alternative == "less":
        p = _binomial_tail(only_a, m)
    elif alternative == "greater":
        p = _binomial_tail(only_b, m)
    else:
        p = min(1.0, 2 * _binomial_tail(min(only_a, only_b), m))
    return McNemar(only_a, only_b, p)


def _binomial_tail(k: int, m: int) -> float:
    """P(X <= k), X binomial(m, 1/2): a sum of whole numbers over 2^m."""
    term = total = 1
    for i in range(k):
        term = term * (m - i) // (i + 1)
        total += term
    return total / 2**m


def _right_or_wrong(values: Any, name: str) -> Array:
    array = np.asarray(values)
    fits = array.ndim == 1 and array.size > 0 and (array.dtype == bool or bool(np.isin(array, (0, 1)).all()))
    check(fits, f"{name}: expected right or wrong [batch], bool or 0/1, got dtype {array.dtype}, shape {array.shape}")
    return array.astype(bool)


def accuracy_difference(
    a: Any, b: Any, clusters: Any, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> AccuracyDifference:
    """Accuracy of a minus that of b on the same prompts: paired bootstrap interval and sign-flip p-value by clusters.

    Both work on the differences a - b in {-1, 0, 1} of each prompt.

    Args:
        a, b: bool [batch], right or wrong.
        clusters: what ``Clusters.of`` takes.
        level, resamples, seed: as in ``bootstrap_mean``.
    Returns:
        An ``AccuracyDifference``; p is two-sided.
    Raises:
        InputError: shapes differ, values other than right and wrong, or fewer than 5 clusters of a factor.
    """
    left, right = _right_or_wrong(a, "a"), _right_or_wrong(b, "b")
    check(left.shape == right.shape, f"b: expected shape {left.shape} like a, got {right.shape}")
    found = Clusters.of(clusters, len(left))
    difference = left.astype(np.float64) - right
    interval = bootstrap_mean(difference, found, level=level, resamples=resamples, seed=seed)
    test = sign_flip(difference, found, flips=resamples, seed=seed)
    return AccuracyDifference(
        accuracy_a=float(left.mean()),
        accuracy_b=float(right.mean()),
        estimate=float(interval.estimate),
        low=float(interval.low),
        high=float(interval.high),
        se=float(interval.se),
        p=float(test.p),
        level=level,
        n_clusters=interval.n_clusters,
        method=f"{interval.method}; {test.method}",
    )
