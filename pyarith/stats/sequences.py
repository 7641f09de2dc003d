"""Confidence sequences: intervals of a mean that hold at every look together, so that one may stop at any of them.

With t clusters, their mean m and standard deviation s, the asymptotic sequence of level 1 - alpha is

    m +- s u(t) / sqrt(t),    u(t) = sqrt(2 (t r + 1) / (t r) log(sqrt(t r + 1) / alpha))

for any r > 0 (Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas 2021, arXiv:2103.06476, theorem 2.2), which holds from a
first look on that is late enough. Two corrections, of higher order in 1 / sqrt(t), make a first look at a few dozen
clusters late enough (simulated in tests/test_stats_race.py):

- u is taken to the same tail of Student's t with t - 1 degrees of freedom, as s is estimated (Wallace 1959,
  doi:10.1214/aoms/1177706197): q = sqrt(v (exp(w^2 / v) - 1)), w = u (8 v + 3) / (8 v + 1), v = t - 1;
- with the skewness g of the clusters the end on the side of the longer tail moves out by g (2 q^2 + 1) / (6 t) s
  (the first term of the Edgeworth expansion of the studentised mean: Hall 1992, The Bootstrap and Edgeworth Expansion,
  sec. 2.6); the other end never moves in.
"""

from __future__ import annotations

import math

import numpy as np

from pyarith.stats.clusters import Array

_LOOK = 6.0  # first look at _LOOK log(1 / alpha) clusters: the further out a tail, the later the CLT holds there
_TAIL = 1 / 6  # weight of the skewness in the first term of the expansion
_TIGHTEST = 3.0  # the sequence is narrowest, relative to a fixed sample size, at so many times the first look


def first_look(alpha: float) -> int:
    """Clusters before the first look at a sequence of level 1 - ``alpha``."""
    return math.ceil(_LOOK * math.log(1 / alpha))


def multiplier(t: int, alpha: float, first: int) -> float:
    """u(t) of the normal sequence that looks first at ``first`` clusters: half the width in standard errors.

    r = (a + log(a + 1)) / t*, a = -2 log(alpha), makes it narrowest at t* (arXiv:2103.06476, appendix B.2).
    """
    a = -2 * math.log(alpha)
    r = (a + math.log(a + 1)) / (_TIGHTEST * first)
    return math.sqrt(2 * (t * r + 1) / (t * r) * math.log(math.sqrt(t * r + 1) / alpha))


def student(u: float, freedom: int) -> float:
    """The quantile of Student's t with the tail of the normal quantile ``u``."""
    w = u * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(min(w * w / freedom, 600.0)))  # 600: finite in fp64, as good as no bound


def sequence(values: Array, alpha: float, first: int) -> tuple[Array, Array, Array]:
    """Mean, low and high end [sender] after the clusters of fp64 ``values`` [sender, cluster], two or more.

    Args:
        values: one value per cluster, clusters independent of each other.
        alpha: chance that some look misses the mean, per sender.
        first: clusters at the first look.
    """
    t = values.shape[1]
    q = student(multiplier(t, alpha, first), t - 1)
    mean = values.mean(1)
    centred = values - mean[:, None]
    variance = (centred**2).mean(1)
    spread = np.sqrt(variance)
    flat = spread <= 1e-14 * np.abs(mean)  # all equal but for rounding: no shape to speak of
    skewness = np.where(flat, 0.0, (centred**3).mean(1) / np.where(flat, 1.0, variance * spread))
    error = spread / math.sqrt(t - 1)
    tail = _TAIL * skewness * (2 * q * q + 1) / math.sqrt(t)
    return mean, mean - error * (q + np.maximum(-tail, 0.0)), mean + error * (q + np.maximum(tail, 0.0))
