"""How many prompts, which prompts, which k; areas of curves; types of heads."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyarith.errors import InputError
from pyarith.stats import (
    bootstrap_mean,
    choose_k,
    circuit_areas,
    components,
    faithfulness,
    folds,
    head_types,
    prompts_for_rank,
    prompts_for_threshold,
    prompts_needed,
    select_report,
)
from pyarith.stats.advice import Components

Z = 1.959963984540054


def table(pairs: int, templates: int, n: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    cells = np.random.default_rng(seed).permutation(pairs * templates)[:n]
    return {"pair": cells // templates, "template": cells % templates}


# how many prompts


def test_components_on_paper() -> None:
    """One factor, 5 pairs of 2 prompts with deviations +-1: (2^2 * 5) / 10^2."""
    effects = np.array([1.0, 1, -1, -1, 1, 1, -1, -1, 0, 0])
    found = components(effects, {"pair": np.repeat(np.arange(5), 2)})
    assert found.parts == (pytest.approx(16 / 100),) and found.rest == 0 and found.se == pytest.approx(0.4)
    # crossed 6 x 5, effect = +-1 by pair: v_pair = 6 * 5^2 / 30^2 = 1/6, v_template = 0, v_rest = 30 / 30^2 = 1/30
    factors = {"pair": np.repeat(np.arange(6), 5), "template": np.tile(np.arange(5), 6)}
    found = components(np.where(factors["pair"] % 2, 1.0, -1.0), factors)
    np.testing.assert_allclose(found.parts, (1 / 6 - 1 / 30, 0), atol=1e-15)
    assert found.rest == pytest.approx(1 / 30) and found.se == pytest.approx(math.sqrt(1 / 6))


def test_advice_on_paper() -> None:
    """V = 0.09 P0/P + 0.04 T0/T + 3 * 0.01 P0 T0/(PT), from a stand-in for the measured parts."""
    parts = Components(("pair", "template"), (30, 10), (0.09, 0.04), 0.01)
    assert parts.variance(30, 10) == pytest.approx(0.16)
    assert parts.variance(60, 10) == pytest.approx(0.045 + 0.04 + 0.015)
    assert parts.variance(60, 20) == pytest.approx(0.045 + 0.02 + 0.0075)
    assert parts.se == pytest.approx(math.sqrt(0.14))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 1.5))
def test_advice_is_just_enough(seed: int, share: float) -> None:
    """The numbers named reach the width and one cluster fewer does not."""
    rng, factors = np.random.default_rng(seed), table(12, 8, 70, seed)
    effects = rng.normal(size=12)[factors["pair"]] + rng.normal(size=8)[factors["template"]] + rng.normal(size=70)
    found = components(effects, factors)
    start = Z * math.sqrt(found.variance(*found.sizes))
    target = share * start
    advice = prompts_needed(effects, factors, target)
    assert advice.half_width == pytest.approx(start) and advice.enough == (share >= 1)
    allowed = (target / Z) ** 2 * (1 + 1e-9)
    sizes = dict(zip(found.names, found.sizes, strict=True))
    for at, name in enumerate(found.names):
        need = advice.more_of[name]
        if math.isinf(need):
            assert found.variance(*(1e12 if name == one else size for one, size in sizes.items())) > allowed * (
                1 - 1e-6
            )
            continue
        for fewer, fits in ((0, True), (1, False)):
            grown = list(found.sizes)
            grown[at] = need - fewer
            if grown[at] > 0:
                assert (found.variance(*grown) <= allowed) == fits
    assert found.variance(*(advice.both[name] for name in found.names)) <= allowed


def test_forecast_comes_true() -> None:
    """Four times the pairs, templates as they are: the forecast of a small run against the bootstrap of a large one."""
    rng, forecast, got = np.random.default_rng(0), [], []
    for _ in range(30):
        by_template = rng.normal(size=(1, 30)) * 0.3
        whole = rng.normal(size=(80, 1)) + by_template + rng.normal(size=(80, 30))
        small, large = whole[:20].reshape(-1), whole.reshape(-1)
        factors = [{"pair": np.repeat(np.arange(p), 30), "template": np.tile(np.arange(30), p)} for p in (20, 80)]
        forecast.append(Z * math.sqrt(components(small, factors[0]).variance(80, 30)))
        found = bootstrap_mean(large, factors[1], resamples=400)
        got.append(float(found.high - found.low) / 2)
    assert np.mean(forecast) == pytest.approx(np.mean(got), rel=0.1)


def test_advice_names_what_cannot_help() -> None:
    """All variance is between templates: no number of pairs is enough."""
    factors = table(10, 8)
    effects = np.linspace(-1, 1, 8)[factors["template"]]
    advice = prompts_for_threshold(effects, factors, threshold=-0.5, fraction=0.5)
    assert advice.target == 0.25 and not advice.enough
    assert advice.more_of["pair"] == math.inf and math.isfinite(advice.more_of["template"])
    assert "no number of pair alone is enough" in advice.text and "10 of pair and 8 of template" in advice.text
    assert prompts_for_threshold(effects, factors, threshold=-50).text.endswith("enough.")


def test_advice_for_a_rank() -> None:
    rng, factors = np.random.default_rng(1), {"item": np.arange(50)}
    shared = rng.normal(size=50)
    effects = np.stack([shared + 0.02 * rng.normal(size=50) + offset for offset in (0.5, -1.0, -0.9, np.nan)])
    advice = prompts_for_rank(effects, factors, 1)
    gap = (effects[2] - effects[1]).mean()
    assert advice.target == pytest.approx(gap) and advice.enough  # what both share plays no part
    difference = effects[1] - effects[2]
    half = Z * math.sqrt(((difference - difference.mean()) ** 2).sum()) / 50
    assert advice.half_width == pytest.approx(half)
    noisy = prompts_for_rank(effects + 3 * rng.normal(size=(4, 50)), factors, 1)
    assert noisy.more_of["item"] > 50 and noisy.both["item"] == noisy.more_of["item"]


def test_refused_advice() -> None:
    factors = table(6, 6)
    flat = np.zeros((3, 36))
    for call, message in (
        (lambda: prompts_needed(flat[0], factors, 0), "half_width"),
        (lambda: prompts_needed(flat, factors, 1), "one sender"),
        (lambda: prompts_needed(flat[0] * np.nan, factors, 1), "only NaN"),
        (lambda: prompts_for_threshold(flat[0], factors, threshold=0), "threshold"),
        (lambda: prompts_for_rank(flat, factors, 3), "below the number of senders 3"),
        (lambda: prompts_for_rank(flat, factors, 1), "equal mean effects"),
        (lambda: prompts_needed(flat[0], {"pair": np.arange(36) % 4}, 1), "at least 5"),
    ):
        with pytest.raises(InputError, match=message):
            call()


# which prompts


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(6, 40), st.integers(1, 12), st.floats(0.2, 0.8))
def test_selection_and_report_are_disjoint(seed: int, pairs: int, templates: int, share: float) -> None:
    factors = table(pairs, templates, seed=seed)
    size = len(factors["pair"])
    select, report = select_report(factors, share=share, seed=seed)
    assert sorted([*select, *report]) == list(range(size))
    assert not set(factors["pair"][select]) & set(factors["pair"][report])
    assert (np.diff(select) > 0).all() and (np.diff(report) > 0).all()
    assert abs(len(select) / size - share) <= 1 / pairs + 1e-9
    again = select_report(factors, share=share, seed=seed)
    np.testing.assert_array_equal(again[0], select)


def test_templates_are_spread_over_both_sides() -> None:
    """200 of 81 x 36 prompts: each template's prompts are shared out more evenly than whole pairs at random would."""
    worst, random = [], []
    for seed in range(10):
        factors = table(81, 36, 200, seed)
        select, report = select_report(factors, seed=seed)
        sides = [np.bincount(factors["template"][side], minlength=36) for side in (select, report)]
        worst.append(np.abs(sides[0] - sides[1]).mean())
        coin = np.random.default_rng(seed).random(81) < 0.5
        chosen = coin[factors["pair"]]
        counts = [np.bincount(factors["template"][side], minlength=36) for side in (chosen, ~chosen)]
        random.append(np.abs(counts[0] - counts[1]).mean())
        assert abs(len(select) - len(report)) <= 4
    assert np.mean(worst) < 0.7 * np.mean(random)


def test_other_seeds_split_otherwise() -> None:
    factors = table(30, 10)
    first = [tuple(select_report(factors, seed=seed)[0]) for seed in range(8)]
    assert len(set(first)) == 8


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6))
def test_folds_hold_whole_pairs(seed: int, number: int) -> None:
    factors = table(24, 6, 120, seed)
    fold = folds(factors, number, seed=seed)
    assert set(fold) == set(range(number)) and fold.shape == (120,)
    for pair in set(factors["pair"]):
        assert len(set(fold[factors["pair"] == pair])) == 1
    counts = np.bincount(fold)
    assert counts.max() - counts.min() <= 10


def test_refused_splits() -> None:
    for call, message in (
        (lambda: select_report(table(6, 6), share=1.0), "share"),
        (lambda: select_report({"pair": [1, 1, 1]}), "one side is empty"),
        (lambda: folds(table(6, 6), 7), "at most the 6 of pair"),
        (lambda: folds(table(6, 6), 1), "n_folds"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_choice_of_k_by_hand() -> None:
    """Means 0.8 0.4 0.31 0.3; se of the last 0.02 / sqrt(2) = 0.0141: k = 5 is within it, k = 2 is not."""
    scores = np.array([[0.8, 0.4, 0.31, 0.28], [0.8, 0.4, 0.31, 0.32]])
    scores[:, 3] = [0.3 - 0.0141421356 * 1.0, 0.3 + 0.0141421356 * 1.0]
    found = choose_k([1, 2, 5, 10], scores)
    assert (found.k, found.best_k) == (5, 10)
    np.testing.assert_allclose(found.mean, [0.8, 0.4, 0.31, 0.3])
    assert found.se[3] == pytest.approx(0.0141421356)
    assert choose_k([1, 2, 5, 10], scores, rule="best").k == 10
    assert choose_k([1, 2, 5, 10], 1 - scores, better="higher").k == 5
    assert choose_k([1, 2, 5, 10], scores, better="higher").k == 1
    for ks, table_, message in (
        ([2, 1], np.zeros((2, 2)), "rising"),
        ([1, 2], np.zeros((1, 2)), "two folds"),
        ([1, 2], np.zeros((2, 3)), "fold, k"),
        ([1, 2], np.array([[0, np.nan], [0, 1]]), "NaN"),
    ):
        with pytest.raises(InputError, match=message):
            choose_k(ks, table_)


# areas


def test_areas_by_hand() -> None:
    """f = 0, 1, 1.5 at k = 0, 0.5, 1: CPR = 0.25 + 0.625; |1 - f| = 1, 0, 0.5: CMD = 0.25 + 0.125."""
    found = circuit_areas([0, 0.5, 1], [0, 1, 1.5])
    assert (found.cpr, found.cmd, found.span) == (0.875, 0.375, (0, 1))
    perfect = circuit_areas([0.001, 0.01, 0.1, 1.0], [1, 1, 1, 1])
    assert perfect.cpr == pytest.approx(0.999) and perfect.cmd == 0
    np.testing.assert_allclose(faithfulness([2.0, 5, 8, 11], nothing=2, everything=8), [0, 0.5, 1, 1.5])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=10, unique=True), st.integers(0, 1000))
def test_areas_are_trapezoids(fractions: list[float], seed: int) -> None:
    trapezoid = pytest.importorskip("scipy.integrate").trapezoid
    k, f = np.sort(fractions), np.random.default_rng(seed).normal(size=len(fractions))
    found = circuit_areas(k, f)
    assert found.cpr == pytest.approx(trapezoid(f, k), abs=1e-12)
    assert found.cmd == pytest.approx(trapezoid(np.abs(1 - f), k), abs=1e-12)
    below = circuit_areas(k, np.minimum(f, 1))
    assert below.cpr + below.cmd == pytest.approx(k[-1] - k[0])  # of a curve that never passes 1


def test_refused_areas() -> None:
    for call, message in (
        (lambda: circuit_areas([0, 0.5, 0.5], [0, 1, 1]), "strictly rising"),
        (lambda: circuit_areas([0, 50, 100], [0, 1, 1]), "0 .. 1"),
        (lambda: circuit_areas([0, 1], [0, np.nan]), "NaN"),
        (lambda: circuit_areas([1], [1]), "two"),
        (lambda: faithfulness([1.0], 3, 3), "other than nothing"),
    ):
        with pytest.raises(InputError, match=message):
            call()


# types


def family(*moved: int, unsure: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Nine heads in a row [1, 9]; those in ``moved`` lie below -5 %, the intervals of ``unsure`` reach across it."""
    low, high, p = np.full((3, 1, 9), [[[-0.01]], [[0.01]], [[0.5]]])
    for head in moved:
        low[0, head], high[0, head], p[0, head] = -0.3, -0.1, 0.001
    for head in unsure:
        low[0, head], high[0, head] = -0.2, 0.0
    return {"low": low, "high": high, "p_adjusted": p}


def test_every_rule_of_the_types() -> None:
    """One head per combination: none, O, A, B, AB, S, OA, AS, OS."""
    families = {
        "operator": family(1, 6, 8),
        "operand_a": family(2, 4, 6, 7),
        "operand_b": family(3, 4),
        "operands": family(5, 7, 8),
    }
    found = head_types(families)
    expected = ["none", "operator", "A", "B", "operands", "operands", "both", "A", "both"]
    assert found.labels[0].tolist() == expected and found.clear.all()
    assert found.counts() == {"none": 1, "operator": 1, "A": 2, "B": 1, "operands": 2, "both": 2}


def test_significance_and_size_are_both_needed() -> None:
    one = family(0, 1, unsure=(2,))
    one["p_adjusted"][0, 1] = 0.2  # large but not significant
    one["high"][0, 3], one["low"][0, 3], one["p_adjusted"][0, 3] = -0.01, -0.02, 0.001  # significant but small
    one["low"][0, 4] = np.nan
    found = head_types({"operator": one})
    assert found.labels[0].tolist() == ["operator"] + ["none"] * 8
    assert found.clear[0].tolist() == [True, False, False, True, False, True, True, True, True]
    assert head_types({"operator": one}, alpha=0.3).labels[0, 1] == "operator"
    assert (head_types({"operator": one}, threshold=-0.2).labels == "none").all()


def test_refused_types() -> None:
    for families, message in (
        ({}, "expected some of"),
        ({"noise": family()}, "noise"),
        ({"operator": {"low": np.zeros((1, 2)), "high": np.zeros((1, 2))}}, "p_adjusted"),
        ({"operator": family(), "operands": {k: v[:, :3] for k, v in family().items()}}, "one shape"),
    ):
        with pytest.raises(InputError, match=message):
            head_types(families)
