"""Bootstrap intervals: exact distributions by enumeration, scipy, coverage by simulation, speed."""

from __future__ import annotations

import math
import time
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyarith.errors import InputError
from pyarith.stats import Clusters, bootstrap, bootstrap_mean
from pyarith.stats.bootstrap import sorted_quantile, weight_blocks

Factors = dict[str, np.ndarray]


def crossed(n_pairs: int, n_templates: int, n: int | None = None, seed: int = 0) -> Factors:
    """The whole table of pairs and templates, or ``n`` of its cells."""
    cells = np.random.default_rng(seed).permutation(n_pairs * n_templates)[:n]
    return {"pair": cells // n_templates, "template": cells % n_templates}


def counts_of(size: int) -> list[tuple[np.ndarray, float]]:
    """Every way to draw ``size`` of ``size`` with replacement: counts and probability."""
    found = []
    for counts in product(range(size + 1), repeat=size):
        if sum(counts) == size:
            ways = math.factorial(size) / math.prod(math.factorial(c) for c in counts)
            found.append((np.array(counts, float), ways / size**size))
    return found


def exact_distribution(effects: np.ndarray, clusters: Clusters) -> tuple[np.ndarray, np.ndarray]:
    """(means, probabilities) over all resamples, by going through them."""
    means, chances = [], []
    for drawn in product(*(counts_of(size) for size in clusters.sizes.values())):
        weights = np.ones(len(effects))
        for (counts, _), codes in zip(drawn, clusters.codes, strict=True):
            weights = weights * counts[codes]
        if weights.sum():
            means.append((weights * effects).sum() / weights.sum())
            chances.append(math.prod(chance for _, chance in drawn))
    chance = np.array(chances)
    return np.array(means), chance / chance.sum()


@pytest.mark.parametrize("names", [("pair",), ("pair", "template")], ids=["one factor", "two factors"])
def test_against_every_resample_there_is(names: tuple[str, ...]) -> None:
    """5 x 5 with unequal numbers of prompts in the cells: the exact distribution has 126 or 15,876 points."""
    rng = np.random.default_rng(3)
    table = {name: values[:22] for name, values in crossed(5, 5, seed=1).items()}
    repeated = np.r_[np.arange(22), 4, 4, 9]
    clusters = Clusters.of({name: table[name][repeated] for name in names})
    effects = rng.normal(size=25) + clusters.codes[0]
    means, chance = exact_distribution(effects, clusters)
    mean = (chance * means).sum()
    se = math.sqrt((chance * (means - mean) ** 2).sum())
    found = bootstrap_mean(effects, clusters, resamples=40_000, seed=5)
    assert found.estimate == pytest.approx(effects.mean(), rel=1e-14)
    assert found.se == pytest.approx(se, rel=0.02)
    order = np.argsort(means)
    below = np.cumsum(chance[order])
    low, high = (means[order][np.searchsorted(below, q)] for q in (0.025, 0.975))
    np.testing.assert_allclose([found.low, found.high], [low, high], atol=0.03 * (high - low))


def test_variance_of_a_full_table_on_paper() -> None:
    """V = sum_g r_g^2 / P^2 + sum_t c_t^2 / T^2 + sum_gt x_gt^2 / (PT)^2: row, column and doubly centred parts."""
    table = np.random.default_rng(0).normal(size=(9, 6)) + np.arange(9)[:, None] * 0.4
    factors = {"pair": np.repeat(np.arange(9), 6), "template": np.tile(np.arange(6), 9)}
    row, column = table.mean(1) - table.mean(), table.mean(0) - table.mean()
    rest = table - table.mean() - row[:, None] - column
    variance = (row**2).sum() / 81 + (column**2).sum() / 36 + (rest**2).sum() / 54**2
    found = bootstrap_mean(table.reshape(-1), factors, resamples=40_000)
    assert found.se == pytest.approx(math.sqrt(variance), rel=0.015)


def test_weights_are_products_of_counts() -> None:
    clusters = Clusters.of(crossed(6, 5))
    (weights,) = weight_blocks(clusters, 500, seed=0)
    table = np.zeros((500, 6, 5))
    table[:, clusters.codes[0], clusters.codes[1]] = weights
    assert (table.sum((1, 2)) == 30).all()  # the table is full, so every resample has 30 prompts
    rows, columns = table.sum(2) / 5, table.sum(1) / 6
    np.testing.assert_array_equal(table, rows[:, :, None] * columns[:, None, :])
    assert rows.var() == pytest.approx(1 - 1 / 6, rel=0.1)  # counts of 6 draws from 6


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    effects, factors = np.random.default_rng(0).normal(size=(7, 120)), crossed(20, 9, 120)
    effects[2, :30] = np.nan
    whole = bootstrap_mean(effects, factors, resamples=1000, interval="bca")
    for block in (1, 3):  # heads at a time
        monkeypatch.setattr(bootstrap, "_MEANS_BYTES", 8 * 1000 * block)
        monkeypatch.setattr(bootstrap, "_WEIGHTS_BYTES", 8 * 120 * 37)  # 37 resamples at a time
        cut = bootstrap_mean(effects, factors, resamples=1000, interval="bca")
        for name in ("estimate", "low", "high", "se"):
            np.testing.assert_allclose(getattr(cut, name), getattr(whole, name), rtol=1e-12, err_msg=name)


def test_same_seed_repeats_and_another_does_not() -> None:
    effects, factors = np.random.default_rng(0).normal(size=(3, 90)), crossed(12, 9, 90)
    first, again, other = (bootstrap_mean(effects, factors, resamples=300, seed=seed) for seed in (4, 4, 5))
    np.testing.assert_array_equal(first.low, again.low)
    assert (first.low != other.low).all()


def test_missing_prompts_are_left_out() -> None:
    """A sender with NaN equals the same sender on the prompts that are left, clusters lost with them included."""
    effects, factors = np.random.default_rng(1).normal(size=200), crossed(15, 14, 200)
    gone = (np.arange(200) % 9 == 0) | (factors["pair"] == 3)
    alone = bootstrap_mean(effects[~gone], {name: one[~gone] for name, one in factors.items()}, resamples=400)
    holed = np.where(gone, np.nan, effects)
    found = bootstrap_mean(holed, factors, resamples=400)
    assert found.n_clusters == {"pair": 14, "template": 14}
    for name in ("estimate", "low", "high", "se"):
        assert getattr(found, name) == getattr(alone, name)
    # beside a sender that has all prompts the clusters are those of both, and the result is the same up to chance
    both = bootstrap_mean(np.stack([holed, effects, np.full(200, np.nan)]), factors, resamples=20_000)
    assert both.estimate[0] == pytest.approx(alone.estimate)
    assert both.se[0] == pytest.approx(bootstrap_mean(holed, factors, resamples=20_000).se, rel=0.03)
    assert np.isnan([both.estimate[2], both.low[2], both.high[2], both.se[2]]).all()


def test_shapes_follow_the_effects() -> None:
    factors = crossed(8, 7)
    for shape in ((), (3,), (2, 4), (0,)):
        found = bootstrap_mean(np.ones((*shape, 56)), factors, resamples=100)
        assert found.low.shape == found.high.shape == found.se.shape == shape
        np.testing.assert_array_equal(found.estimate, np.ones(shape))
        np.testing.assert_allclose(found.low, 1, rtol=1e-12)  # a constant has an interval of no width


def test_bca_against_scipy() -> None:
    """One prompt an item: the plain BCa of the mean. Skewed, so that it differs from the percentile interval."""
    stats = pytest.importorskip("scipy.stats")
    values = np.exp(1.2 * np.random.default_rng(7).normal(size=25))
    found = bootstrap_mean(values, {"item": np.arange(25)}, resamples=40_000, interval="bca")
    plain = bootstrap_mean(values, {"item": np.arange(25)}, resamples=40_000)
    options = {"n_resamples": 40_000, "random_state": np.random.default_rng(1), "batch": 4000}
    oracle = stats.bootstrap((values,), np.mean, method="BCa", **options)
    percentile = stats.bootstrap((values,), np.mean, method="percentile", **options)
    width = plain.high - plain.low
    np.testing.assert_allclose([found.low, found.high], oracle.confidence_interval, atol=0.015 * width)
    np.testing.assert_allclose([plain.low, plain.high], percentile.confidence_interval, atol=0.015 * width)
    assert found.high - plain.high > 0.1 * width
    assert found.se == pytest.approx(oracle.standard_error, rel=0.02)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30), st.floats(0, 1))
def test_quantile_is_numpys(values: list[float], level: float) -> None:
    row = np.sort(np.array([values]), axis=1)
    padded = np.concatenate([row, np.full((1, 3), np.nan)], axis=1)
    found = sorted_quantile(padded, np.array([level]), np.array([len(values)]))
    assert found[0] == pytest.approx(np.quantile(values, level), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-10, 10))
def test_moves_and_scales_with_the_effects(seed: int, scale: float, shift: float) -> None:
    effects, factors = np.random.default_rng(seed).normal(size=(2, 60)), crossed(10, 8, 60, seed)
    plain = bootstrap_mean(effects, factors, resamples=200, seed=seed)
    moved = bootstrap_mean(effects * scale + shift, factors, resamples=200, seed=seed)
    turned = bootstrap_mean(-effects, factors, resamples=200, seed=seed)
    for name in ("estimate", "low", "high"):
        expected = getattr(plain, name) * scale + shift
        np.testing.assert_allclose(getattr(moved, name), expected, atol=1e-9 * (1 + scale + abs(shift)))
    np.testing.assert_allclose(turned.low, -plain.high, atol=1e-12)
    assert (plain.low <= plain.estimate).all() and (plain.estimate <= plain.high).all()


def test_order_of_prompts_and_names_of_clusters_do_not_matter() -> None:
    effects, factors = np.random.default_rng(0).normal(size=80), crossed(9, 10, 80)
    order = np.random.default_rng(1).permutation(80)
    named = {"pair": [f"{10 + p},3" for p in factors["pair"]], "template": factors["template"]}
    shuffled = {name: np.asarray(values)[order] for name, values in named.items()}
    one = bootstrap_mean(effects, factors, resamples=300)
    other = bootstrap_mean(effects[order], shuffled, resamples=300)
    np.testing.assert_allclose([one.low, one.high], [other.low, other.high], rtol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clusters": crossed(4, 9)}, r"at least 5 of each factor, got \{'pair': 4\} in 36 prompts"),
        ({"clusters": {"pair": np.arange(36), "template": np.zeros(36)}}, r"give \['pair'\] alone"),
        ({"clusters": {"item": np.arange(36) % 3}}, r"got \{'item': 3\}"),
        ({"clusters": crossed(9, 9)}, "expected 36 values"),
        ({"level": 1.0}, "level"),
        ({"resamples": 10}, "resamples"),
        ({"resamples": True}, "resamples"),
        ({"interval": "basic"}, "percentile"),
        ({"effects": np.full(36, np.inf)}, "infinity"),
        ({"effects": np.array(["a"] * 36)}, "dtype"),
        ({"effects": 3.0}, "shape"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments = {"effects": np.zeros(36), "clusters": crossed(6, 6), **change}
    with pytest.raises(InputError, match=message):
        bootstrap_mean(arguments.pop("effects"), arguments.pop("clusters"), **arguments)


def test_too_sparse_is_refused() -> None:
    """A sender with two prompts: most resamples hold neither of them."""
    effects = np.random.default_rng(0).normal(size=(2, 100))
    effects[1, 2:] = np.nan
    with pytest.raises(InputError, match="resamples hold no prompt of a sender that has 2 prompts"):
        bootstrap_mean(effects, crossed(10, 10), resamples=500)


def test_coverage_on_crossed_data() -> None:
    """Nominal 95 %, 40 x 20 in full, equal variances: two-way about 94 %, pairs alone about 75 %, rows about 30 %."""
    rng, runs = np.random.default_rng(11), 400
    factors = crossed(40, 20)
    pair, template = factors["pair"], factors["template"]
    effects = rng.normal(size=(runs, 40))[:, pair] + rng.normal(size=(runs, 20))[:, template]
    effects += rng.normal(size=(runs, 800))
    schemes = {"two": factors, "pair": {"pair": pair}, "row": {"item": np.arange(800)}}
    covered = {}
    for name, clusters in schemes.items():
        found = bootstrap_mean(effects, clusters, resamples=1000, seed=2)
        covered[name] = float(((found.low <= 0) & (found.high >= 0)).mean())
    assert 0.90 <= covered["two"] <= 0.97
    assert covered["pair"] < 0.85
    assert covered["row"] < 0.45


def test_speed() -> None:
    """A quarter of 10,000 resamples of 1,024 heads on 1,000 prompts; the whole is in bench/bench_stats.py."""
    effects, factors = np.random.default_rng(0).normal(size=(1024, 1000)), crossed(81, 36, 1000)
    start = time.perf_counter()
    bootstrap_mean(effects, factors, resamples=2500)
    assert time.perf_counter() - start < 5
