"""Rankings and prompts as rows, for CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyarith.discovery.adaptive import TopHeads
from pyarith.discovery.discover import Discovery
from pyarith.result import PatchResult
from pyarith.stats import Confidence, SenderConfidence

Row = Mapping[str, Any]


def head_rows(
    result: PatchResult,
    threshold: float = -0.05,
    confidence: Confidence | None = None,
    top: TopHeads | None = None,
) -> list[Row]:
    """All heads, the most negative effect first: rank, layer, head, effect, logit_change, noise_floor, key (0 or 1).

    With a ``confidence`` also effect_low, effect_high, effect_se, p and p_adjusted. Of a race also top (0 or 1),
    decision (in, out, undecided, and whether as a tie), cluster_change with its interval _low and _high, clusters and
    prompts.
    """
    sure = None if confidence is None else confidence.heads
    rows = sorted(_rows(result, "head", sure), key=lambda row: (math.isnan(row["effect"]), row["effect"]))
    race = {} if top is None else _race(top)
    return [
        {"rank": i, **row, "key": int(row["effect"] < threshold), **race.get((row["layer"], row["head"]), {})}
        for i, row in enumerate(rows, start=1)
    ]


def _race(top: TopHeads) -> dict[tuple[int, int], Row]:
    """What a race says of each head."""
    chosen = set(top.heads)
    return {
        (int(layer), int(head)): {
            "top": int((layer, head) in chosen),
            "decision": top.decision((int(layer), int(head))),
            "cluster_change": float(top.change[layer, head]),
            "cluster_change_low": float(top.low[layer, head]),
            "cluster_change_high": float(top.high[layer, head]),
            "clusters": int(top.n_clusters[layer, head]),
            "prompts": int(top.n_prompts[layer, head]),
        }
        for layer, head in np.ndindex(top.status.shape)
    }


def mlp_rows(result: PatchResult, confidence: Confidence | None = None) -> list[Row]:
    """All MLPs, the largest effect of either sign first: rank, layer, effect, logit_change, noise_floor, as heads."""
    sure = None if confidence is None else confidence.mlps
    rows = sorted(_rows(result, "mlp", sure), key=lambda row: (math.isnan(row["effect"]), -abs(row["effect"])))
    return [{"rank": i, **{k: v for k, v in row.items() if k != "head"}} for i, row in enumerate(rows, start=1)]


def _rows(result: PatchResult, kind: str, sure: SenderConfidence | None) -> list[dict[str, Any]]:
    rows = [{k: v for k, v in row.items() if k != "kind"} for row in result.rows() if row["kind"] == kind]
    if sure is not None:
        for row in rows:
            at = (row["layer"], row["head"]) if kind == "head" else (row["layer"],)
            row |= {f"effect_{name}": float(getattr(sure, name)[at]) for name in ("low", "high", "se")}
            row |= {name: float(getattr(sure, name)[at]) for name in ("p", "p_adjusted")}
    return rows


def prompt_rows(discovery: Discovery) -> list[Row]:
    """Every prompt with what the model made of it, and its strata."""
    pairs, result = discovery.pairs, discovery.result
    p_clean, p_corrupted = np.exp(result.clean_log_probs), np.exp(result.corrupted_log_probs)
    return [
        {
            "prompt": pairs.prompts[i],
            "corrupted": pairs.corrupted_prompts[i],
            "answer": pairs.answer_texts[i],
            "correct": int(discovery.correct[i]),
            "still_correct": int(discovery.still_correct[i]),
            "clean_logit": float(result.clean_logits[i]),
            "corrupted_logit": float(result.corrupted_logits[i]),
            "p_clean": float(p_clean[i]),
            "p_corrupted": float(p_corrupted[i]),
            **{name: values[i] for name, values in pairs.strata.items()},
        }
        for i in range(len(pairs))
    ]


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Rows with the same keys, as UTF-8 with a header; floats as short as they can be read back exactly."""
    rows = list(rows)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
