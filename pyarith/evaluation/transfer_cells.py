"""One task under one list of heads: drops, paired tests and controls, from what was right."""

from __future__ import annotations

import numpy as np

from pyarith.ablation_result import Ablation
from pyarith.evaluation.heads import HeadList
from pyarith.evaluation.transfer_result import Cell, Control
from pyarith.stats import Clusters, accuracy_difference, mcnemar


def make_cell(
    task: str,
    name: str,
    heads: HeadList,
    intact: np.ndarray,
    arms: dict[str, np.ndarray],
    sets: dict[str, tuple[Ablation, ...]],
    clusters: Clusters | None,
    resamples: int,
    seed: int,
) -> Cell:
    """One task under one list; ``arms`` bool [draw, item]."""
    right = arms["key"][0]
    test = mcnemar(right, intact)
    difference = (
        None if clusters is None else accuracy_difference(right, intact, clusters, resamples=resamples, seed=seed)
    )
    controls = {
        arm: Control(
            heads=tuple(one.heads for one in sets[arm]),
            accuracy=tuple(float(value) for value in drawn.mean(1)),
            relative_drop=tuple(relative(one, intact) for one in drawn),
            relative_drop_correct=tuple(relative_correct(one, intact) for one in drawn),
            p=float((1 + (drawn.sum(1) <= right.sum()).sum()) / (1 + len(drawn))),
        )
        for arm, drawn in arms.items()
        if arm != "key"
    }
    nan = float("nan")
    return Cell(
        task=task,
        heads=name,
        head_names=tuple(map(str, heads.heads)),
        n=len(intact),
        right_intact=int(intact.sum()),
        right=int(right.sum()),
        relative_drop=relative(right, intact),
        relative_drop_correct=relative_correct(right, intact),
        difference=float(right.mean() - intact.mean()),
        low=nan if difference is None else difference.low,
        high=nan if difference is None else difference.high,
        p=nan if difference is None else difference.p,
        lost=test.only_b,
        gained=test.only_a,
        p_mcnemar=test.p,
        method="too few items for an interval" if difference is None else difference.method,
        correct=right,
        controls=controls,
    )


def relative(right: np.ndarray, intact: np.ndarray) -> float:
    """(accuracy - intact accuracy) / intact accuracy, NaN where the intact model is never right."""
    return float((int(right.sum()) - int(intact.sum())) / int(intact.sum())) if intact.any() else float("nan")


def relative_correct(right: np.ndarray, intact: np.ndarray) -> float:
    """The same over the items that the intact model gets right."""
    return float(right[intact].mean() - 1) if intact.any() else float("nan")
