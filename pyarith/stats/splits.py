"""Selection and report on different prompts; folds, and the choice of k by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyarith.errors import check
from pyarith.stats.clusters import Array, Clusters, check_count, effects_array

RULES = ("one-se", "best")
BETTER = ("lower", "higher")


def _deal(clusters: Clusters, shares: Array, seed: int) -> Array:
    """int64 [batch]: a part for each prompt; whole clusters of the first factor, other factors in proportion.

    Clusters are taken in random order, the large ones first; each goes to the part where the sum over the other
    factor's levels and the total of (prompts there - share)^2 grows least, ties to the part that lacks most.
    """
    groups, size = clusters.codes[0], len(clusters.labels[0])
    levels = clusters.codes[1] if len(clusters.names) == 2 else np.zeros(len(groups), np.int64)
    n_levels = int(levels.max()) + 1
    table = np.zeros((size, n_levels))
    np.add.at(table, (groups, levels), 1)
    random = np.random.default_rng(seed).permutation(size)
    order = random[np.argsort(-table.sum(1)[random], kind="stable")]
    wanted = shares[:, None] * table.sum(0)  # [part, level]
    have = np.zeros_like(wanted)
    total = wanted.sum(1)
    part_of = np.zeros(size, np.int64)
    for group in order:
        gap = wanted - have
        cost = ((table[group] - 2 * gap) * table[group]).sum(1)
        left = total - have.sum(1)
        cost += (table[group].sum() - 2 * left) * table[group].sum()
        best = np.flatnonzero(cost <= cost.min() + 1e-9)
        chosen = best[np.argmax(left[best])]
        have[chosen] += table[group]
        part_of[group] = chosen
    return part_of[groups]


def select_report(clusters: Any, *, share: float = 0.5, seed: int = 0) -> tuple[Array, Array]:
    """Prompts to select heads on and prompts to report their effects on, with no operand pair (or item) in both.

    A head picked for its extreme effect looks larger on the prompts it was picked on than it is; on others it does not.

    Args:
        clusters: what ``Clusters.of`` takes. Whole clusters of the first factor go to one side; the other factor, the
            templates, is spread over both in proportion as far as whole clusters allow.
        share: of the prompts that go to selection.
        seed: of the division.
    Returns:
        (select, report): sorted int64 indices, disjoint, together all prompts.
    Raises:
        InputError: share outside 0 .. 1, or so few clusters that one side would be empty.
    Notes: the templates are the same on both sides; a report on other templates needs templates set aside by hand.
    """
    found = Clusters.of(clusters)
    check(0 < share < 1, f"share: expected a number between 0 and 1, got {share!r}")
    part = _deal(found, np.array([share, 1 - share]), seed)
    select, report = np.flatnonzero(part == 0), np.flatnonzero(part == 1)
    full = bool(len(select) and len(report))
    check(full, f"clusters: {found.sizes} are too few for a share of {share}: one side is empty; use more prompts")
    return select, report


def folds(clusters: Any, n_folds: int = 5, *, seed: int = 0) -> Array:
    """The fold of each prompt, int64 [batch] 0 .. n_folds - 1; no operand pair (or item) is in two folds.

    Args:
        clusters: what ``Clusters.of`` takes; the second factor is spread evenly as far as whole clusters allow.
        n_folds: two or more.
        seed: of the division.
    Raises:
        InputError: fewer clusters than folds.
    """
    found = Clusters.of(clusters)
    check_count(n_folds, "n_folds", 2)
    size = len(found.labels[0])
    check(size >= n_folds, f"n_folds: expected at most the {size} of {found.names[0]}, got {n_folds}")
    return _deal(found, np.full(n_folds, 1 / n_folds), seed)


@dataclass(frozen=True, eq=False)
class ChoiceOfK:
    """The k that folds agree on.

    Attributes:
        k: chosen.
        best_k: the k of the best mean.
        ks: [k].
        mean, se: [k] over the folds; se = standard deviation / sqrt(n_folds).
        rule: in words.
    """

    k: int
    best_k: int
    ks: Array
    mean: Array
    se: Array
    rule: str


def choose_k(ks: Any, scores: Any, *, better: str = "lower", rule: str = "one-se") -> ChoiceOfK:
    """Number of heads to knock out (or keep, or tune), from scores on prompts that did not rank the heads.

    For each fold f: rank the heads on all other folds, knock out the first k, score on f. Then "best" takes the k of
    the best mean over folds; "one-se" the smallest k whose mean is within one standard error of that best mean.

    Args:
        ks: int [k], rising.
        scores: [fold, k], such as accuracy under knock-out, or better: that minus the accuracy under same-layer
            controls.
        better: "lower" for accuracy under knock-out, "higher" for what is kept or gained.
        rule: "one-se" or "best". Damage seldom stops growing with k, so for knock-outs "best" picks the largest k.
    Returns:
        A ``ChoiceOfK``. Its mean is a little too good, being the best of several: report on prompts of no fold.
    Raises:
        InputError: shapes do not match, fewer than two folds, NaN, or an unknown name.
    References: Hastie, Tibshirani & Friedman 2009, The Elements of Statistical Learning, sec. 7.10.1.
    """
    numbers = np.asarray(ks)
    table = effects_array(scores, "scores", 2)
    whole = numbers.ndim == 1 and numbers.dtype.kind in "iu" and numbers.size > 0 and bool((np.diff(numbers) > 0).all())
    check(whole, f"ks: expected rising whole numbers, got {ks!r}")
    fits = table.ndim == 2 and table.shape[1] == len(numbers) and len(table) >= 2
    check(fits, f"scores: expected [fold, k] with two folds or more and {len(numbers)} ks, got {table.shape}")
    check(not np.isnan(table).any(), "scores: expected a score for every fold and k, got NaN")
    check(better in BETTER, f"better: expected one of {BETTER}, got {better!r}")
    check(rule in RULES, f"rule: expected one of {RULES}, got {rule!r}")
    mean, se = table.mean(0), table.std(0, ddof=1) / np.sqrt(len(table))
    loss = mean if better == "lower" else -mean
    best = int(loss.argmin())
    within = loss <= loss[best] + (se[best] if rule == "one-se" else 0.0)
    chosen = int(np.flatnonzero(within)[0])
    words = "smallest k within one standard error of the best" if rule == "one-se" else "best mean"
    return ChoiceOfK(int(numbers[chosen]), int(numbers[best]), numbers, mean, se, f"{words} ({better} is better)")
