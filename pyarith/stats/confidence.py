"""Intervals and p-values of all heads and MLPs of one result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyarith.errors import InputError, check
from pyarith.stats.bootstrap import bootstrap_mean
from pyarith.stats.clusters import Array, Clusters, effects_array
from pyarith.stats.signs import adjust_together, sign_flip
from pyarith.types import Head

METRICS = ("relative", "logit")


@dataclass(frozen=True, eq=False)
class SenderConfidence:
    """Statistics of one kind of sender; each array fp64 [n_layers, n_heads] for heads, [n_layers] for MLPs.

    Attributes:
        estimate: mean effect.
        low, high: ends of the two-sided interval.
        se: standard error, of the resampled means.
        p: two-sided, of the mean effect being 0.
        p_adjusted: Benjamini-Hochberg over all heads and MLPs of the result together.
    """

    estimate: Array
    low: Array
    high: Array
    se: Array
    p: Array
    p_adjusted: Array

    def below(self, threshold: float, alpha: float) -> Array:
        """bool: the whole interval lies below ``threshold``, and p_adjusted < alpha."""
        return (self.high < threshold) & (self.p_adjusted < alpha)


@dataclass(frozen=True, eq=False, repr=False)
class Confidence:
    """How sure the effects of a result are.

    Attributes:
        heads, mlps: their statistics; None where not among the senders.
        metric: "relative" (of the clean logit) or "logit" (change of the answer's logit).
        level: nominal coverage of the intervals.
        n_clusters: number of clusters of each factor.
        n_prompts: prompts used.
        method: in words.
    """

    heads: SenderConfidence | None
    mlps: SenderConfidence | None
    metric: str
    level: float
    n_clusters: dict[str, int]
    n_prompts: int
    method: str

    def key_heads(self, threshold: float | None = None, alpha: float = 0.05) -> list[Head]:
        """Heads whose whole interval lies below ``threshold`` and whose adjusted p is below alpha, strongest first.

        Args:
            threshold: None = -0.05 (the paper's -5 %) for relative effects; logits have no default.
            alpha: false discovery rate.
        Raises:
            InputError: heads were not among the senders, or no threshold for logits.
        """
        if self.heads is None:
            raise InputError("key_heads: heads were not among the senders; call fast_patch with senders=('heads',)")
        chosen = np.argwhere(self.heads.below(self._threshold(threshold), alpha))
        heads = [Head(int(layer), int(head)) for layer, head in chosen]
        return sorted(heads, key=lambda head: float(self.heads.estimate[head]) if self.heads else 0.0)

    def key_mlps(self, threshold: float | None = None, alpha: float = 0.05) -> list[int]:
        """Layers of MLPs below ``threshold`` by the rule of ``key_heads``, strongest first.

        Raises:
            InputError: MLPs were not among the senders, or no threshold for logits.
        """
        if self.mlps is None:
            raise InputError("key_mlps: MLPs were not among the senders; call fast_patch with senders=('mlps',)")
        chosen = np.flatnonzero(self.mlps.below(self._threshold(threshold), alpha))
        return [int(layer) for layer in chosen[np.argsort(self.mlps.estimate[chosen], kind="stable")]]

    def _threshold(self, threshold: float | None) -> float:
        if threshold is None:
            asked = "threshold: expected a number of logits, got None; the default of -0.05 is for metric='relative'"
            check(self.metric == "relative", asked)
            return -0.05
        return threshold

    def __repr__(self) -> str:
        unit = "of the clean logit" if self.metric == "relative" else "logits"
        lines = [f"Confidence: {self.n_prompts} prompts, {self.level:.0%} intervals, {unit}", f"  {self.method}"]
        if self.heads is not None:
            order = np.argsort(self.heads.estimate, axis=None)[:5]
            for index in order:
                head = Head(*map(int, np.unravel_index(index, self.heads.estimate.shape)))
                lines.append(f"  {head!s:>7}  {self._line(self.heads, head)}")
        if self.mlps is not None:
            for layer in np.argsort(-np.abs(self.mlps.estimate))[:3]:
                lines.append(f"  MLP {layer:>3}  {self._line(self.mlps, (int(layer),))}")
        return "\n".join(lines)

    def _line(self, found: SenderConfidence, at: tuple[int, ...]) -> str:
        form = "{:+.2%}" if self.metric == "relative" else "{:+.4f}"
        estimate, low, high = (form.format(one[at]) for one in (found.estimate, found.low, found.high))
        return f"{estimate}  [{low}, {high}]  adjusted p {found.p_adjusted[at]:.2g}"


def confidence(
    head_effects: Any,
    mlp_effects: Any,
    clusters: Any,
    *,
    metric: str = "relative",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Confidence:
    """Bootstrap intervals and sign-flip p-values of all senders of a result; what ``PatchResult.confidence`` calls.

    Intervals: ``bootstrap_mean``, percentile. p: ``sign_flip``, two-sided, per operand pair, with at least
    2 m / (1 - level) random patterns for m senders, so that one head alone can pass the correction at 1 - level.
    p_adjusted: ``benjamini_hochberg`` over heads and MLPs together.

    Args:
        head_effects: [n_layers, n_heads, batch] or None; NaN = left out.
        mlp_effects: [n_layers, batch] or None.
        clusters: what ``Clusters.of`` takes.
        metric: what the effects are; only for the output.
        level, resamples, seed: as in ``bootstrap_mean``.
    Returns:
        A ``Confidence``.
    Raises:
        InputError: as ``bootstrap_mean`` and ``sign_flip``; no senders; every prompt left out.
    """
    check(metric in METRICS, f"metric: expected one of {METRICS}, got {metric!r}")
    given = [None if one is None else effects_array(one) for one in (head_effects, mlp_effects)]
    present = [one for one in given if one is not None]
    check(len(present) > 0, "effects: expected heads or MLPs, got neither; call fast_patch with senders")
    batch = present[0].shape[-1]
    found = Clusters.of(clusters, batch)
    flat = np.concatenate([one.reshape(-1, batch) for one in present])
    usable = ~np.isnan(flat).all(0)
    check(bool(usable.any()), "effects: every prompt is left out (clean logit <= 0); use metric='logit'")
    flat, found = flat[:, usable], found.take(usable)
    interval = bootstrap_mean(flat, found, level=level, resamples=resamples, seed=seed)
    flips = max(resamples, math.ceil(2 * len(flat) / (1 - level)))
    test = sign_flip(flat, found, flips=flips, seed=seed)
    (adjusted,) = adjust_together(test.p)
    columns = (interval.estimate, interval.low, interval.high, interval.se, test.p, adjusted)
    senders: list[SenderConfidence | None] = []
    at = 0
    for one in given:
        if one is None:
            senders.append(None)
            continue
        shape, rows = one.shape[:-1], slice(at, at + math.prod(one.shape[:-1]))
        senders.append(SenderConfidence(*(np.asarray(column)[rows].reshape(shape) for column in columns)))
        at = rows.stop
    left_out = f"; {batch - len(found)} prompts left out" if len(found) < batch else ""
    return Confidence(
        heads=senders[0],
        mlps=senders[1],
        metric=metric,
        level=level,
        n_clusters=interval.n_clusters,
        n_prompts=len(found),
        method=f"{interval.method}; {test.method}; Benjamini-Hochberg over {len(flat)} senders{left_out}",
    )
