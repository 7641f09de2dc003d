"""Tests of mean effects by flipping signs, and the correction for testing many heads at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyarith.errors import check
from pyarith.stats.clusters import Array, Clusters, check_count, effects_array, group_sums

ALTERNATIVES = ("two-sided", "less", "greater")
CORRECTIONS = ("bh", "by")
_EXACT = 1 << 14  # all sign patterns are gone through up to so many
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class SignFlip:
    """p-values [...] of mean effects, from ``n_patterns`` sign patterns (all that exist where ``exact``)."""

    p: Array
    n_patterns: int
    exact: bool
    method: str


def sign_flip(
    effects: Any,
    clusters: Any,
    *,
    alternative: str = "two-sided",
    null: float = 0.0,
    flips: int = 10_000,
    seed: int = 0,
) -> SignFlip:
    """p-value of "the mean effect is ``null``", flipping the signs of all prompts of a cluster together.

    T(s) = sum_g s_g S_g with S_g = sum of (effect - null) over the prompts of cluster g. All 2^n patterns s:
    p = #{T(s) as far out as T(1, ..., 1)} / 2^n. Random patterns: p = (1 + #) / (1 + flips). Under two-sided, as far
    out means |T(s)| >= |T(1, ..., 1)|.

    Args:
        effects: [..., batch]; NaN prompts are left out, per sender.
        clusters: what ``Clusters.of`` takes. Signs belong to its first factor, the operand pairs or items.
        alternative: "two-sided", "less" (effects below null) or "greater".
        null: the mean that is put to the test; -0.05 with "less" asks whether a head is beyond -5 %.
        flips: number of random patterns where 2^n exceeds both 16384 and this; below, all are gone through.
        seed: of the random patterns, the same for all senders.
    Returns:
        A ``SignFlip`` with fp64 p [...]; NaN where a sender has no value.
    Raises:
        InputError: a wrong shape, name or number, or fewer than two clusters.
    Notes: assumes that under the null a cluster's sum is symmetric about 0 and independent of the others'. A template's
        own effect is shared by all operand pairs, so the test speaks for the templates at hand; the two-way interval
        speaks for others of their kind too. The smallest p is 1 / 2^n (two-sided 2 / 2^n), or 1 / (1 + flips): with m
        senders, flips >= m / alpha are needed for a lone one to pass Benjamini-Hochberg.
    References: Fisher 1935, The Design of Experiments, sec. 21; Phipson & Smyth 2010, doi:10.2202/1544-6115.1585 (the
        1 + # of random patterns).
    """
    check(alternative in ALTERNATIVES, f"alternative: expected one of {ALTERNATIVES}, got {alternative!r}")
    check_count(flips, "flips", 99)
    values = effects_array(effects)
    found = Clusters.of(clusters, values.shape[-1])
    name, size = found.names[0], found.sizes[found.names[0]]
    check(size >= 2, f"clusters: sign flips need at least 2 of {name}, got {size}")
    flat = values.reshape(-1, values.shape[-1])
    known = ~np.isnan(flat)
    sums = group_sums(np.where(known, flat - null, 0.0), found.codes[0], size)
    exact = size < 63 and 2**size <= max(_EXACT, flips)
    total = 2**size if exact else flips
    observed = sums.sum(1)
    slack = 1e-12 * np.abs(sums).sum(1)  # equal sums differ in the last bits with the order of summation
    extreme = np.zeros(len(flat), np.int64)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_BYTES // (8 * max(size, len(flat), 1)))
    for start in range(0, total, block):
        number = min(block, total - start)
        signs = _patterns(start, number, size) if exact else rng.integers(0, 2, (number, size)) * 2.0 - 1.0
        flipped = sums @ signs.T
        if alternative == "less":
            beyond = flipped <= (observed + slack)[:, None]
        elif alternative == "greater":
            beyond = flipped >= (observed - slack)[:, None]
        else:
            beyond = np.abs(flipped) >= (np.abs(observed) - slack)[:, None]
        extreme += beyond.sum(1)
    p = extreme / total if exact else (1 + extreme) / (1 + total)
    p = np.where(known.any(1), p, np.nan)
    way = f"all {total} sign patterns" if exact else f"{total} random sign patterns"
    return SignFlip(p.reshape(values.shape[:-1]), total, exact, f"{alternative} sign flips per {name} ({size}), {way}")


def _patterns(start: int, number: int, size: int) -> Array:
    """Rows start .. start + number of the table of all sign patterns, [number, size] of +-1; row 0 is all +1."""
    index = np.arange(start, start + number, dtype=np.int64)[:, None]
    return 1.0 - 2.0 * ((index >> np.arange(size, dtype=np.int64)) & 1)


def benjamini_hochberg(p: Any, *, method: str = "bh") -> Array:
    """Adjusted p-values of any number of tests: q_(i) = min over j >= i of min(1, m p_(j) / j).

    Calling what has q <= alpha keeps the expected share of false calls at most at alpha.

    Args:
        p: p-values of any shape; NaN stays NaN and does not count in m.
        method: "bh" (independent or positively dependent tests), or "by" (any dependence: times sum_{i<=m} 1/i).
    Returns:
        fp64, shape of p.
    Raises:
        InputError: a p-value outside 0 .. 1, or an unknown method.
    References: Benjamini & Hochberg 1995, doi:10.1111/j.2517-6161.1995.tb02031.x; Benjamini & Yekutieli 2001,
        doi:10.1214/aos/1013699998.
    """
    check(method in CORRECTIONS, f"method: expected one of {CORRECTIONS}, got {method!r}")
    values = effects_array(p, "p", least_ndim=0)
    inside = np.isnan(values) | ((values >= 0) & (values <= 1))
    check(bool(inside.all()), f"p: expected values in 0 .. 1 or NaN, got {values[~inside].reshape(-1)[:3]}")
    known = ~np.isnan(values)
    tested = values[known]
    out = np.full(values.shape, np.nan)
    if not tested.size:
        return out
    ranks = np.arange(1, tested.size + 1)
    order = np.argsort(tested, kind="stable")
    scaled = tested[order] * (tested.size / ranks) * ((1 / ranks).sum() if method == "by" else 1.0)
    adjusted = np.empty_like(tested)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    out[known] = adjusted
    return out


def adjust_together(*p_values: Any, method: str = "bh") -> tuple[Array | None, ...]:
    """``benjamini_hochberg`` over several arrays as one family, such as all heads and all MLPs; None stays None.

    Raises:
        InputError: as ``benjamini_hochberg``.
    """
    arrays = [None if p is None else effects_array(p, "p", least_ndim=0) for p in p_values]
    given = [array.reshape(-1) for array in arrays if array is not None]
    if not given:
        return (None,) * len(arrays)
    adjusted = benjamini_hochberg(np.concatenate(given), method=method)
    out: list[Array | None] = []
    at = 0
    for array in arrays:
        out.append(None if array is None else adjusted[at : at + array.size].reshape(array.shape))
        at += 0 if array is None else array.size
    return tuple(out)
