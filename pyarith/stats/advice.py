"""How many operand pairs and templates it takes to say something.

The variance of a mean over crossed prompts is split by clusters (Cameron, Gelbach & Miller 2011,
doi:10.1198/jbes.2010.07136). With d_p = effect - mean, over n prompts:

    v_pair = sum_g (sum of d over pair g)^2 / n^2        v_template likewise        v_rest = sum_p d_p^2 / n^2
    pair = max(0, v_pair - v_rest)                       template = max(0, v_template - v_rest)

and what the two-way bootstrap will show with P pairs and T templates instead of P0 and T0, prompts growing with both:

    V(P, T) = pair P0 / P + template T0 / T + 3 v_rest P0 T0 / (P T)

(3 because that bootstrap counts the rest three times: Owen 2007.) With one factor: V(P) = v_pair P0 / P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from pyarith.errors import InputError, check
from pyarith.stats.clusters import Array, Clusters, check_count, check_level, effects_array, group_sums

_REST = 3  # how often the two-way bootstrap counts the variance that belongs to single prompts


@dataclass(frozen=True)
class Components:
    """Parts of the variance of one mean, by what they shrink with.

    Attributes:
        names, sizes: of the factors, as measured.
        parts: variance of the mean that shrinks with the number of clusters of each factor.
        rest: variance that shrinks with the number of prompts (two factors; 0 with one).
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    parts: tuple[float, ...]
    rest: float

    @property
    def se(self) -> float:
        """Standard error with the rest counted once: the closed form of Cameron, Gelbach & Miller."""
        return math.sqrt(sum(self.parts) + self.rest)

    def variance(self, *sizes: float) -> float:
        """Of the bootstrap's mean, with so many clusters of each factor."""
        ratios = [old / new for old, new in zip(self.sizes, sizes, strict=True)]
        shrunk = sum(part * ratio for part, ratio in zip(self.parts, ratios, strict=True))
        return shrunk + _REST * self.rest * math.prod(ratios)


@dataclass(frozen=True)
class Advice:
    """What it takes to bring the half-width of an interval down to ``target``.

    Attributes:
        target, half_width: wanted, and as it is now (by the formula above).
        enough: half_width <= target.
        more_of: factor -> clusters needed if the other factor stays as it is; inf = no number is enough.
        both: factor -> clusters needed if both grow in proportion.
        text: the same in a sentence.
    """

    target: float
    half_width: float
    enough: bool
    more_of: dict[str, float]
    both: dict[str, int]
    text: str


def components(effects: Any, clusters: Any) -> Components:
    """Parts of the variance of one sender's mean effect.

    Args:
        effects: [batch]; NaN prompts are left out.
        clusters: what ``Clusters.of`` takes.
    Raises:
        InputError: no values, or fewer than 5 clusters of a factor.
    """
    values = effects_array(effects)
    check(values.ndim == 1, f"effects: expected one sender's effects [batch], got shape {values.shape}")
    found = Clusters.of(clusters, len(values))
    known = ~np.isnan(values)
    check(bool(known.any()), "effects: expected values, got only NaN")
    values, found = values[known], found if known.all() else found.take(known)
    found.require()
    deviations = values - values.mean()
    square = len(values) ** 2
    sizes = tuple(found.sizes.values())
    of_factors = [
        float((group_sums(deviations, codes, size) ** 2).sum() / square)
        for codes, size in zip(found.codes, sizes, strict=True)
    ]
    if len(sizes) == 1:
        return Components(found.names, sizes, (of_factors[0],), 0.0)
    rest = float((deviations**2).sum() / square)
    return Components(found.names, sizes, tuple(max(0.0, one - rest) for one in of_factors), rest)


def prompts_needed(effects: Any, clusters: Any, half_width: float, *, level: float = 0.95) -> Advice:
    """Operand pairs and templates needed for an interval of a given half-width.

    z^2 V(P, T) <= half_width^2 with z = Phi^-1((1 + level) / 2) and V as in this module's head, solved for P at T = T0,
    for T at P = P0, and for P / P0 = T / T0.

    Args:
        effects: [batch] of one sender, from a first run; NaN prompts are left out.
        clusters: what ``Clusters.of`` takes.
        half_width: wanted, in units of the effects, > 0.
        level: of the interval.
    Returns:
        An ``Advice``. It extrapolates from variances that a first run of G clusters knows to about sqrt(2 / G) of
        themselves, takes the interval for symmetric, and the new clusters for ones of the same kind. It promises the
        width on average, not in every run.
    Raises:
        InputError: half_width <= 0; fewer than 5 clusters of a factor.
    """
    good = isinstance(half_width, float | int | np.floating) and bool(np.isfinite(half_width)) and half_width > 0
    check(good, f"half_width: expected a positive number, got {half_width!r}")
    check_level(level)
    found = components(effects, clusters)
    z = NormalDist().inv_cdf((1 + level) / 2)
    allowed = (half_width / z) ** 2
    now = z * math.sqrt(found.variance(*found.sizes))
    more_of: dict[str, float] = {}
    for at, (name, size) in enumerate(zip(found.names, found.sizes, strict=True)):
        fixed = sum(found.parts) - found.parts[at]
        falling = found.parts[at] + _REST * found.rest
        more_of[name] = _ceil(size * falling / (allowed - fixed)) if allowed > fixed else math.inf
    ratio = _growth(sum(found.parts), _REST * found.rest, allowed)
    both = {name: int(_ceil(size * ratio)) for name, size in zip(found.names, found.sizes, strict=True)}
    return Advice(
        half_width, now, now <= half_width, more_of, both, _sentence(found, level, now, half_width, more_of, both)
    )


def _growth(linear: float, square: float, allowed: float) -> float:
    """The factor x of both sizes at which linear / x + square / x^2 = allowed."""
    return (linear + math.sqrt(linear**2 + 4 * allowed * square)) / (2 * allowed)


def _ceil(value: float) -> float:
    """Up to a whole number, at least 1, rounding errors of exact cases aside."""
    return max(1.0, float(math.ceil(value - 1e-9)))


def _sentence(
    found: Components, level: float, now: float, target: float, more_of: dict[str, float], both: dict[str, int]
) -> str:
    have = " and ".join(f"{size} of {name}" for name, size in zip(found.names, found.sizes, strict=True))
    text = f"{have}: the {level:.0%} interval is about +-{now:.3g}, wanted +-{target:.3g}"
    if now <= target:
        return f"{text}: enough."
    ways = [
        f"no number of {name} alone is enough" if math.isinf(need) else f"{need:.0f} of {name}"
        for name, need in more_of.items()
    ]
    if len(both) == 2:
        ways.append("together " + " and ".join(f"{need} of {name}" for name, need in both.items()))
    return f"{text}; expected to need {', or '.join(ways)} of the same kind (a forecast, good to tens of per cent)."


def prompts_for_threshold(
    effects: Any, clusters: Any, *, threshold: float = -0.05, fraction: float = 0.5, level: float = 0.95
) -> Advice:
    """``prompts_needed`` for a half-width of ``fraction`` of |threshold| (half of -5 %: +-2.5 %).

    Args:
        effects: [batch] of one sender; take the widest of those near the threshold.
        clusters, level: as there.
        threshold: what a key head must be below.
        fraction: of the threshold that the half-width may have.
    Raises:
        InputError: threshold 0, fraction <= 0, or as ``prompts_needed``.
    """
    good = math.isfinite(threshold) and threshold != 0 and fraction > 0
    check(
        good, f"threshold, fraction: expected a threshold other than 0 and a fraction > 0, got {threshold}, {fraction}"
    )
    return prompts_needed(effects, clusters, abs(threshold) * fraction, level=level)


def prompts_for_rank(effects: Any, clusters: Any, k: int, *, level: float = 0.95) -> Advice:
    """``prompts_needed`` to tell the head of rank k from that of rank k + 1.

    The interval of their difference, prompt by prompt, must leave out 0: half-width <= |mean difference|. The two heads
    are the ones that have these ranks now; the observed gap is a noisy guess of the true one and, chosen by rank, no
    more than that.

    Args:
        effects: [..., batch]; rank 1 is the lowest mean effect.
        clusters, level: as in ``prompts_needed``.
        k: 1 .. number of senders - 1.
    Raises:
        InputError: k out of range, both means equal, or as ``prompts_needed``.
    """
    values = effects_array(effects, least_ndim=2).reshape(-1, np.shape(effects)[-1])
    values = values[~np.isnan(values).all(1)]
    check_count(k, "k")
    check(k < len(values), f"k: expected below the number of senders {len(values)}, got {k}")
    means: Array = np.nanmean(values, axis=1)
    order = np.argsort(means, kind="stable")
    difference = values[order[k - 1]] - values[order[k]]
    gap = abs(float(np.nanmean(difference)))
    if gap == 0:
        raise InputError(f"k: ranks {k} and {k + 1} have equal mean effects, so no number of prompts tells them apart")
    return prompts_needed(difference, clusters, gap, level=level)
