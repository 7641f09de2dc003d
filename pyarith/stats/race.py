"""Which k of many means are smallest: successive elimination with confidence sequences over clusters.

Clusters are visited in a random order; from time to time one looks at the intervals of all senders still in the race.
A sender is surely *in* the smallest k when fewer than k others can lie at or below it, surely *out* when k others
surely lie below it; both leave the race (Even-Dar, Mannor & Mansour 2006, JMLR 7:1079). With a tolerance others leave
it earlier, as ties, such that at the end no sender that is in can lie more than the tolerance above one that is out
(the guarantee of Kalyanakrishnan & Stone 2010, Efficient Selection of Multiple Bandit Arms, sec. 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pyarith.errors import InputError, check
from pyarith.stats.clusters import Array, check_count, check_level
from pyarith.stats.sequences import first_look, sequence

_GROWTH = 1.25  # from one look to the next


@dataclass(frozen=True)
class Round:
    """What is measured before the next look.

    Attributes:
        prompts: int64 indices of the prompts to run.
        clusters: int64 codes of the clusters that this look averages over.
        alpha: share of the error that the looks of this pass may spend, over all senders.
        first: clusters at the first look of the pass.
    """

    prompts: Array
    clusters: Array
    alpha: float
    first: int


def rounds(codes: Array, senders: int, confidence: float, seed: int) -> Iterator[Round]:
    """The rounds of a race over prompts with cluster ``codes`` 0 .. size - 1, in a random order.

    The first pass takes one prompt of each cluster, in an order of the clusters drawn once, with looks at growing
    numbers of clusters: while it lasts, its values are independent. Pass p completes every cluster to 2^p prompts, with
    one look at its end. Pass p may spend 2^-(p + 1) of the error, the last what is left.
    """
    stream = np.random.default_rng(seed)
    order = stream.permutation(int(codes.max()) + 1)
    places = stream.permutation(len(codes))
    by_cluster = places[np.argsort(codes[places], kind="stable")]  # random within each cluster
    sizes = np.bincount(codes)
    rank = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    starts = np.cumsum(sizes) - sizes
    passes = 1 + math.ceil(math.log2(int(sizes.max())))
    for number in range(passes):
        alpha = (1 - confidence) * 2.0 ** -min(number + 1, passes - 1)
        first = min(first_look(alpha / senders), len(order))
        if number > 0:
            yield Round(by_cluster[(rank >= 2 ** (number - 1)) & (rank < 2**number)], order, alpha, first)
            continue
        done = 0
        while done < len(order):
            upto = max(first, math.ceil(_GROWTH * done))
            upto = len(order) if _GROWTH * upto > len(order) else upto  # no short last round
            yield Round(by_cluster[starts[order[done:upto]]], order[:upto], alpha, first)
            done = upto


class Race:
    """The state of a race of ``senders`` means for the ``k`` smallest.

    Attributes:
        mean, low, high: fp64 [sender] at the last look that a sender took part in.
        status: int8 [sender], 1 = in, -1 = out, 0 = undecided.
        n_clusters: int64 [sender] clusters at that look.
    """

    def __init__(self, senders: int, k: int, confidence: float) -> None:
        check_count(k, "top_k")
        check(k < senders, f"top_k: expected fewer than the {senders} heads there are, got {k}; all heads need no race")
        check_level(confidence, "confidence")
        self.k = k
        self.mean, self.low, self.high = np.zeros(senders), np.full(senders, -np.inf), np.full(senders, np.inf)
        self.status = np.zeros(senders, np.int8)
        self._sure = np.zeros(senders, np.int8)
        self._ceiling, self._floor = np.inf, -np.inf
        self.n_clusters = np.zeros(senders, np.int64)

    @property
    def tied(self) -> Array:
        """bool [sender] decided, but within the tolerance only."""
        return np.asarray((self.status != 0) & (self.status != self._sure))

    @property
    def running(self) -> Array:
        """int64 indices of the senders that are not decided."""
        return np.flatnonzero(self.status == 0)

    @property
    def places(self) -> int:
        """How many of the undecided are in the smallest k."""
        return self.k - int((self.status == 1).sum())

    @property
    def chosen(self) -> Array:
        """int64 [k] the senders in, and of the undecided those with the smallest means; smallest mean first."""
        running = self.running
        best = running[np.argsort(self.mean[running], kind="stable")[: self.places]]
        found = np.concatenate([np.flatnonzero(self.status == 1), best])
        return found[np.argsort(self.mean[found], kind="stable")]

    def look(self, values: Array, alpha: float, first: int, tolerance: float) -> None:
        """Take in the values [running sender, cluster] of a look, and decide what can be decided.

        All looks hold together, so a sender's interval is where they overlap; where two do not, the latest.
        """
        running = self.running
        mean, low, high = sequence(values, alpha / len(self.status), first)
        self.mean[running] = mean
        self.n_clusters[running] = values.shape[1]
        both_low, both_high = np.maximum(low, self.low[running]), np.minimum(high, self.high[running])
        overlap = both_low <= both_high
        self.low[running] = np.where(overlap, both_low, low)
        self.high[running] = np.where(overlap, both_high, high)
        self._decide(tolerance)

    def _decide(self, tolerance: float) -> None:
        """Decide what can be decided from the intervals."""
        while self._find_sure():
            pass
        while self._decide_one(tolerance):
            pass

    def _find_sure(self) -> bool:
        """Mark the senders that would be decided without a tolerance; whether there were new ones."""
        rest, places = np.flatnonzero(self._sure == 0), self.k - int((self._sure == 1).sum())
        low, high = np.sort(self.low[rest]), np.sort(self.high[rest])
        reach = np.searchsorted(low, self.high[rest], "right") - 1  # others that may lie at or below this one
        below = np.searchsorted(high, self.low[rest], "left")  # others that surely lie below it
        self._sure[rest[reach < places]] = 1
        self._sure[rest[below >= places]] = -1
        return bool((self._sure[rest] != 0).any())

    def _decide_one(self, tolerance: float) -> bool:
        """Put one sender in or out such that, at the end, high <= low + tolerance for every one in and every one out.

        The intervals of senders that are decided stay as they are. Without a tolerance this decides what is sure.
        Kept true: of the undecided, enough for the free places have high <= ceiling, the smallest low + tolerance of
        those out; and enough for the others have low + tolerance >= floor, the largest high of those in.
        """
        running, places = self.running, self.places
        if not len(running):
            return False
        high, raised = self.high[running], self.low[running] + tolerance
        ceiling, floor = np.minimum(self._ceiling, raised), np.maximum(self._floor, high)
        below = np.searchsorted(np.sort(high), ceiling, "right") - (high <= ceiling)
        above = len(running) - np.searchsorted(np.sort(raised), floor, "left") - (raised >= floor)
        out = (below >= places) & (raised >= self._floor)
        into = (above >= len(running) - places) & (high <= self._ceiling)
        order = np.argsort(self.mean[running], kind="stable")  # the furthest from the boundary goes first
        if out.any():
            one = order[out[order]][-1]
            self.status[running[one]], self._ceiling = -1, float(ceiling[one])
        elif into.any():
            one = order[into[order]][0]
            self.status[running[one]], self._floor = 1, float(floor[one])
        return bool(out.any() or into.any())


def check_tolerance(tolerance: float) -> None:
    """Raise unless ``tolerance`` is a finite number >= 0."""
    real = isinstance(tolerance, int | float | np.number) and not isinstance(tolerance, bool)
    if not (real and math.isfinite(tolerance) and tolerance >= 0):
        raise InputError(f"tolerance: expected a number of logits >= 0, or None, got {tolerance!r}")
