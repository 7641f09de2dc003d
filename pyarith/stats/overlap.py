"""Overlap of sets of heads, next to what two unrelated sets would share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyarith.errors import check
from pyarith.stats.clusters import Array, check_count


@dataclass(frozen=True)
class Overlap:
    """Two sets of heads.

    Attributes:
        jaccard: |A and B| / |A or B|; NaN where both are empty.
        common: |A and B|.
        expected_common: |A| |B| / population, its mean for unrelated sets of these sizes.
        expected_jaccard: mean Jaccard overlap of unrelated sets of these sizes.
        p: chance that unrelated sets share as many or more.
        sizes: (|A|, |B|).
        population: number of heads to choose from.
    """

    jaccard: float
    common: int
    expected_common: float
    expected_jaccard: float
    p: float
    sizes: tuple[int, int]
    population: int


def jaccard(a: Iterable[Any], b: Iterable[Any]) -> float:
    """|A and B| / |A or B|; NaN where both sets are empty."""
    left, right = set(a), set(b)
    either = len(left | right)
    return len(left & right) / either if either else math.nan


def overlap(a: Iterable[Any], b: Iterable[Any], population: int) -> Overlap:
    """Overlap of two sets of heads with its hypergeometric expectation.

    P(X = x) = C(|A|, x) C(N - |A|, |B| - x) / C(N, |B|).

    Args:
        a, b: heads, ``(layer, head)`` or ``Head``; repeats count once.
        population: N, the number of heads of the model (all that could have been chosen).
    Returns:
        An ``Overlap``. Unrelated means that every set of this size is equally likely; if both rankings favour the same
        layers for a reason of no interest, compare with sets drawn from the same layers instead.
    Raises:
        InputError: a set is larger than the population.
    """
    left, right = set(a), set(b)
    check_count(population, "population")
    common = len(left & right)
    need = len(left | right)
    check(need <= population, f"population: expected at least the {need} heads in a and b, got {population}")
    shared, weights = hypergeometric(len(left), len(right), population)
    return Overlap(
        jaccard=jaccard(left, right),
        common=common,
        expected_common=len(left) * len(right) / population,
        expected_jaccard=expected_jaccard(len(left), len(right), population),
        p=min(1.0, float(weights[shared >= common].sum())),
        sizes=(len(left), len(right)),
        population=population,
    )


def expected_jaccard(n_a: int, n_b: int, population: int) -> float:
    """Mean Jaccard overlap of unrelated sets of n_a and n_b: sum_x P(X = x) x / (n_a + n_b - x), X hypergeometric.

    Raises:
        InputError: a set is larger than the population.
    """
    most = max(n_a, n_b)
    check(most <= population, f"population: expected at least {most}, got {population}")
    shared, weights = hypergeometric(n_a, n_b, population)
    return float((weights * shared / np.maximum(n_a + n_b - shared, 1)).sum())


def hypergeometric(n_a: int, n_b: int, population: int) -> tuple[Array, Array]:
    """(x, P(X = x)) of the number that a set of n_a and a random set of n_b out of ``population`` share."""
    shared = np.arange(max(0, n_a + n_b - population), min(n_a, n_b) + 1)
    whole = math.comb(population, n_b)
    ways = (math.comb(n_a, int(x)) * math.comb(population - n_a, n_b - int(x)) for x in shared)
    return shared, np.array([one / whole for one in ways])
