"""How sure a discovery is: intervals and p-values of all senders, and whether halves of the prompts agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyarith import stats
from pyarith.discovery.discover import Discovery
from pyarith.errors import InputError

_TOP = 10


@dataclass(frozen=True)
class Judgement:
    """Statistics of one discovery; where there are none, ``reason`` says why.

    Attributes:
        confidence: intervals and p-values, or None.
        stability: split-half agreement, ready for JSON, or None.
        reason: why something is missing; empty where nothing is.
    """

    confidence: stats.Confidence | None
    stability: dict[str, Any] | None
    reason: str = ""

    def record(self, threshold: float) -> dict[str, Any]:
        """The entries ``confidence`` and ``stability`` of a run's record."""
        sure = self.confidence
        known: dict[str, Any] = {"reason": self.reason}
        if sure is not None:
            known = {"method": sure.method, "level": sure.level, "clusters": sure.n_clusters, "prompts": sure.n_prompts}
            if sure.heads is not None:
                known["key_heads"] = [str(head) for head in sure.key_heads(threshold)]
        return {"confidence": known, "stability": self.stability or {"reason": self.reason}}


def judge(discovery: Discovery, *, seed: int = 0) -> Judgement:
    """Two-way bootstrap, sign flips and split halves, as far as the prompts have clusters enough; never an error."""
    if discovery.top is not None:
        return Judgement(None, None, "heads were raced, and run on different prompts: the race has its own intervals")
    result, pairs = discovery.result, discovery.pairs
    try:
        sure = result.confidence(pairs, seed=seed)
    except InputError as error:
        return Judgement(None, None, str(error))
    if result.head_changes is None:
        return Judgement(sure, None, "heads were not among the senders")
    clean = result.clean_logits.astype(np.float64)
    effects = result.head_changes / np.where(clean > 0, clean, np.nan)
    top = max(1, min(_TOP, effects[..., 0].size - 1))
    try:
        halves = stats.split_half(effects, pairs, k=(top,), seed=seed)
    except InputError as error:
        return Judgement(sure, None, str(error))
    stability = {
        "spearman": {name: getattr(halves.spearman, name) for name in ("median", "low", "high")},
        "spearman_brown": halves.spearman_brown,
        "top_k": top,
        "top_jaccard": {name: getattr(halves.jaccard[top], name) for name in ("median", "low", "high")},
        "top_jaccard_chance": halves.jaccard_chance[top],
        "clusters": halves.n_clusters,
        "what": "rank correlation of head effects, and Jaccard of the top k, between halves of the operand pairs",
    }
    return Judgement(sure, stability)
