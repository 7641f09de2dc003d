"""The step ``knockout``: curves on prompts that did not rank the heads, per operator of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pyarith import stats
from pyarith.discovery.knockout import Arm, KnockoutCurve, knockout_curve
from pyarith.engine.baselines import MeanAblation, ResampleAblation, ZeroAblation
from pyarith.engine.store import Store, circumstances
from pyarith.engine.sweep import ablation_sweep
from pyarith.errors import AlignmentError, InputError, check
from pyarith.models.sites import resolve
from pyarith.prompts import PromptPairs
from pyarith.reporting.saved import SavedRun, ranking_of
from pyarith.types import Head

BASELINES = ("mean", "zero", "resample", "mean-per-position")
PROMPTS = ("fresh", "report")
ARMS = ("key", "random", "same_layer", "bottom", "kept")


@dataclass(frozen=True)
class Chosen:
    """Prompts for a curve, the ranking of all heads, and how they relate to the run's prompts.

    Attributes:
        pairs: the prompts.
        ranking: all heads, most negative effect first.
        counts: how many were drawn, left out because the run has them, and share an operand pair with the run.
        words: the same in a sentence.
    """

    pairs: PromptPairs
    ranking: tuple[Head, ...]
    counts: dict[str, int]
    words: str


def choose(run: SavedRun, tokenizer: Any, sign: str, kind: str, n: int | None, seed: int) -> Chosen:
    """Prompts that did not rank the heads.

    Args:
        run, tokenizer, sign: whose prompts to avoid.
        kind: "fresh", a new draw without the run's prompts, heads ranked on all of the run's prompts; or "report", the
            half of the run's prompts that ``stats.select_report`` sets aside, heads ranked on the other half, so that
            no operand pair is in both.
        n: how many fresh prompts; None = as many as the run has.
        seed: of the draw or the division.
    Raises:
        InputError: no prompt is left; ``n`` was given with "report"; "report" of a run with ``top_k``.
    """
    check(kind in PROMPTS, f"prompts: expected one of {', '.join(PROMPTS)}, got {kind!r}")
    return _report(run, tokenizer, sign, n, seed) if kind == "report" else _fresh(run, tokenizer, sign, n, seed)


def _fresh(run: SavedRun, tokenizer: Any, sign: str, n: int | None, seed: int) -> Chosen:
    old = {row["prompt"] for row in run.prompts[sign]}
    wanted = int(run.record["runs"][sign]["data"]["n"]) if n is None else n
    check(wanted >= 1, f"n: expected a positive whole number, got {n}")
    try:  # so many that enough are left when all of the run's turn up again
        drawn = run.draw(tokenizer, sign, n=wanted + len(old), seed=seed)
    except AlignmentError:  # there are not so many different ones
        drawn = run.draw(tokenizer, sign, n=wanted, seed=seed)
    new = np.array([text not in old for text in drawn.prompts])
    last = len(new) if new.sum() <= wanted else int(np.flatnonzero(new)[wanted - 1]) + 1
    kept = np.flatnonzero(new[:last])
    check(
        len(kept) > 0,
        f"n: expected prompts that the run does not have, got none among {last} drawn for {sign}; the run used up what "
        "there is; knockout --prompts report takes half of the run's",
    )
    pairs = drawn.subset(kept)
    seen = {row.get("pair") for row in run.prompts[sign]}
    shared = int(sum(str(pair) in seen for pair in pairs.strata["pair"]))
    counts = {"drawn": last, "overlap_left_out": last - len(kept), "prompts": len(kept), "operand_pair_in_run": shared}
    fewer = "" if len(kept) == wanted else f" (asked for {wanted})"
    words = (
        f"{last} prompts drawn with seed {seed}, {last - len(kept)} of them the run's own and left out, {len(kept)} "
        f"used{fewer}; {shared} of these have an operand pair of the run in another template"
    )
    return Chosen(pairs, run.ranking(sign), counts, words)


def _report(run: SavedRun, tokenizer: Any, sign: str, n: int | None, seed: int) -> Chosen:
    check(n is None, "n: expected none with --prompts report, which takes half of the run's prompts")
    check(
        run.top(sign) is None,
        f"prompts: expected fresh for a run with --top-k, got report: the heads of {sign} were run on different "
        "prompts, so a half of them has no ranking",
    )
    pairs = run.pairs(tokenizer, sign)
    select, report = stats.select_report(pairs, seed=seed)
    result = run.results[sign]
    run.effects(sign)  # refuses a run without heads
    clean = result.clean_logits.astype(np.float64)[select]
    usable = clean > 0
    check(bool(usable.any()), f"RUN_DIR: every clean answer logit of {sign} is <= 0: there is no ranking")
    changes = np.asarray(result.head_changes)[..., select[usable]]
    ranking = ranking_of((changes / clean[usable]).mean(-1, dtype=np.float64))
    counts = {"select": len(select), "report": len(report), "prompts": len(report), "operand_pair_in_run": 0}
    words = f"heads ranked again on {len(select)} of the run's prompts, curve on the other {len(report)}; no operand "
    return Chosen(pairs.subset(report), ranking, counts, words + "pair is in both")


def curve(
    model: Any, chosen: Chosen, baseline: str, *, resume: Path | None = None, **options: Any
) -> tuple[KnockoutCurve, int]:
    """The curve under a named baseline, and how many prompts had no other of their length (0 where none needs one).

    ``mean`` is over all positions of the prompts answered rightly; ``mean-per-position`` one mean per position among
    prompts of equal length; ``resample`` takes z of another prompt of equal length.

    Args:
        resume: a folder in which the curve is kept, and its parts while it is made; see ``ablation_sweep``.
        options: for ``knockout_curve``.
    """
    parts = Store(resume).under(
        lambda: {
            "what": ["knockout", baseline, {name: value for name, value in options.items() if name != "progress"}],
            "prompts": [chosen.pairs.clean, chosen.pairs.attention_mask, chosen.pairs.answers],
            "ranking": chosen.ranking,
            "circumstances": circumstances(resolve(model)),
        }
    )
    kept = parts.get("curve")
    if kept is not None:
        return KnockoutCurve.unpacked(kept.arrays, kept.record["curve"]), int(kept.record["alone"])
    found, alone = _curve(model, chosen, baseline, {"resume": resume, **options})
    arrays, record = found.packed()
    parts.put(("curve",), arrays, {"curve": record, "alone": alone})
    return found, alone


def _curve(model: Any, chosen: Chosen, baseline: str, options: dict[str, Any]) -> tuple[KnockoutCurve, int]:
    check(baseline in BASELINES, f"baseline: expected one of {', '.join(BASELINES)}, got {baseline!r}")
    pairs, ranking = chosen.pairs, chosen.ranking
    if baseline in ("mean", "zero"):
        given = None if baseline == "mean" else ZeroAblation()
        return knockout_curve(model, pairs, ranking, baseline=given, **options), 0
    right = _right(model, pairs)
    lengths = pairs.lengths
    several = {length for length in np.unique(lengths) if (lengths[right] == length).sum() > 1}
    usable = right & np.isin(lengths, list(several))
    if not usable.any():
        raise InputError(f"baseline: {baseline} needs two prompts of equal length that the model answers rightly")
    n_wrong, alone = int((~right).sum()), int((right & ~usable).sum())
    used = pairs.subset(usable)
    if baseline == "resample":
        inputs = used.inputs()
        drawn = ResampleAblation.from_inputs(model, inputs["clean"], inputs["attention_mask"], options.get("seed", 0))
        found = knockout_curve(model, used, ranking, baseline=drawn, **options)
    else:
        parts = []
        for bucket in used.buckets():
            means = MeanAblation.from_inputs(model, bucket.inputs()["clean"], over="batch")
            parts.append(knockout_curve(model, bucket, ranking, baseline=means, **options))
        found = _joined(parts)
    return replace(found, n_wrong=n_wrong + found.n_wrong), alone


def _right(model: Any, pairs: PromptPairs) -> np.ndarray:
    """bool [batch]: the intact model's first choice is the answer."""
    sweep = ablation_sweep(model, pairs, sets=[(0, 0)], predictions=True, verify=0, progress=False)
    return np.asarray(sweep.clean_predictions == np.asarray(pairs.answers))


def _joined(parts: list[KnockoutCurve]) -> KnockoutCurve:
    """One curve of several over other prompts: same seed, so the same sets in each."""
    first, sizes = parts[0], np.array([part.n_prompts for part in parts])
    share = sizes / sizes.sum()
    arms = {}
    for name, arm in first.arms.items():
        same = [part.arms[name] for part in parts]
        assert all(other.heads == arm.heads for other in same)
        correct = np.concatenate([other.correct for other in same], -1)
        logit = sum(weight * other.logit for weight, other in zip(share, same, strict=True))
        arms[name] = Arm(name, arm.heads, correct.mean(-1), np.asarray(logit), correct)
    everything = [float(share @ np.array([part.all_ablated[i] for part in parts])) for i in range(2)]
    clean = float(share @ np.array([part.clean_logit for part in parts]))
    return replace(
        first,
        arms=arms,
        n_prompts=int(sizes.sum()),
        n_wrong=sum(part.n_wrong for part in parts),
        clean_logit=clean,
        all_ablated=(everything[0], everything[1]),
    )


def curve_rows(sign: str, found: KnockoutCurve) -> list[dict[str, Any]]:
    """Rows for knockout.csv: the curve's own with the operator and the relative drop, (accuracy - 1)."""
    return [{"operator": sign, **row, "relative_drop": row["accuracy"] - 1.0} for row in found.rows()]


def curve_record(found: KnockoutCurve, chosen: Chosen, alone: int) -> dict[str, Any]:
    """What knockout.json says of one operator's curve; the ablated sets are listed, so that any point can be redone."""
    record: dict[str, Any] = {
        "prompts": found.n_prompts,
        "wrong_left_out": found.n_wrong,
        "no_other_of_equal_length_left_out": alone,
        "drawn": chosen.counts,
        "semantics": found.semantics,
        "settings": found.settings,
        "ranking": [str(head) for head in found.ranking],
        "clean_logit": found.clean_logit,
        "all_ablated": {"accuracy": found.all_ablated[0], "logit": found.all_ablated[1]},
        "rows": found.rows(),
        "sets": {name: [[str(one) for one in draw] for draw in arm.heads] for name, arm in found.arms.items()},
    }
    if "kept" in found.arms and found.all_ablated[1] != found.clean_logit:  # else there is no scale
        areas = found.areas()
        record |= {"faithfulness": found.faithfulness(), "areas": {"cpr": areas.cpr, "cmd": areas.cmd}}
    return record
