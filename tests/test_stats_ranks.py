"""Stability of rankings and overlap of head sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyarith.errors import InputError
from pyarith.stats import (
    Clusters,
    across_groups,
    expected_jaccard,
    jaccard,
    overlap,
    rank_correlation,
    spearman,
    split_half,
)
from pyarith.stats.bootstrap import weight_blocks
from pyarith.stats.ranks import ranks
from pyarith.types import Head

scipy_stats = pytest.importorskip("scipy.stats")


def planted(noise: float, seed: int = 0, senders: int = 40, pairs: int = 16, templates: int = 9) -> tuple:
    """Effects = a fixed ranking + noise per operand pair + noise per prompt, on the whole table."""
    rng = np.random.default_rng(seed)
    pair, template = np.repeat(np.arange(pairs), templates), np.tile(np.arange(templates), pairs)
    true = np.linspace(-1, 1, senders)[:, None]
    effects = true + noise * (rng.normal(size=(senders, pairs))[:, pair] + rng.normal(size=(senders, len(pair))))
    return effects, {"pair": pair, "template": template}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=30))
def test_ranks_are_scipys(values: list[int]) -> None:
    both = np.array([values, values[::-1]], float)
    np.testing.assert_array_equal(ranks(both), scipy_stats.rankdata(both, axis=1))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 40), st.booleans())
def test_spearman_is_scipys(seed: int, size: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, size))
    if ties:
        a, b = np.round(a), np.round(b + a)
    if np.ptp(a) and np.ptp(b):
        assert spearman(a, b) == pytest.approx(scipy_stats.spearmanr(a, b).statistic, abs=1e-12)
        assert spearman(a, np.exp(a)) == pytest.approx(1)  # only the order counts
        assert spearman(-a, b) == pytest.approx(-spearman(a, b))


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    grid = np.array([[1.0, 2, 3], [4, np.nan, 5]])
    other = np.array([[1.0, 2, 3], [5, 0, np.nan]])
    assert spearman(grid, other) == pytest.approx(1)  # entries with NaN in either are left out
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3])) and math.isnan(spearman([1, np.nan], [1, 2]))
    with pytest.raises(InputError, match=r"expected shape \(2,\) like a, got \(3,\)"):
        spearman([1, 2], [1, 2, 3])


def test_halves_of_a_sure_and_an_unsure_ranking() -> None:
    effects, factors = planted(0.0)
    sure = split_half(effects, factors, k=(1, 5), splits=50)
    assert sure.spearman.median == pytest.approx(1) and sure.spearman_brown == pytest.approx(1)
    assert sure.jaccard[5].low == 1 and sure.n_clusters == 16
    effects, factors = planted(1.0)
    unsure = split_half(effects, factors, k=(5,), splits=100)
    assert 0.3 < unsure.spearman.low < unsure.spearman.median < unsure.spearman.high < 0.97
    r = unsure.spearman.median
    assert unsure.spearman_brown == pytest.approx(2 * r / (1 + r)) and unsure.spearman_brown > r
    nothing = split_half(np.random.default_rng(1).normal(size=effects.shape), factors, k=(10,), splits=200)
    assert abs(nothing.spearman.median) < 0.25
    assert nothing.jaccard_chance[10] == expected_jaccard(10, 10, 40)


def test_halves_share_no_operand_pair() -> None:
    """An effect that lives in single pairs: halves of pairs cannot agree on it, halves of prompts would."""
    factors, rng = planted(0.0)[1], np.random.default_rng(3)
    by_pair = rng.normal(size=(40, 16))[:, factors["pair"]]
    assert abs(split_half(by_pair, factors, splits=100).spearman.median) < 0.3
    assert split_half(by_pair, {"item": np.arange(144)}, splits=100).spearman.median > 0.7


def test_one_split_by_hand() -> None:
    """Four pairs, two on each side, every split counted: the values are those of the three ways to halve four."""
    effects = np.random.default_rng(4).normal(size=(6, 4))
    found = split_half(effects, {"pair": np.arange(4)}, k=(2,), splits=400)
    ways = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    halves = [(effects[:, list(a)].mean(1), effects[:, list(b)].mean(1)) for a, b in ways]
    expected = sorted({round(scipy_stats.spearmanr(a, b).statistic, 9) for a, b in halves})
    assert sorted(set(np.round(found.spearman.values, 9))) == expected
    tops = {round(jaccard(np.argsort(a)[:2], np.argsort(b)[:2]), 9) for a, b in halves}
    assert set(np.round(found.jaccard[2].values, 9)) == tops


def test_halves_with_missing_prompts() -> None:
    effects, factors = planted(0.2)
    effects[3] = np.nan  # a sender without values is no sender
    effects[5, ::7] = np.nan
    found = split_half(effects, factors, splits=50)
    without = split_half(np.delete(effects, 3, 0), factors, splits=50)
    np.testing.assert_array_equal(found.spearman.values, without.spearman.values)
    assert found.spearman.median > 0.8


def test_refused_halves() -> None:
    effects, factors = planted(0.1)
    for change, message in (
        ({"clusters": {"pair": factors["pair"] % 3}}, "at least 4 of pair, got 3"),
        ({"k": (41,)}, "at most the 40 senders"),
        ({"splits": 0}, "splits"),
        ({"effects": effects[:1]}, "two senders"),
        ({"effects": effects[0]}, "sender, batch"),
    ):
        arguments = {"effects": effects, "clusters": factors, **change}
        with pytest.raises(InputError, match=message):
            split_half(arguments.pop("effects"), arguments.pop("clusters"), **arguments)


def test_across_templates() -> None:
    effects, factors = planted(0.5)
    effects[:, factors["template"] == 4] *= -1  # one template turns everything round
    found = across_groups(effects, factors["template"])
    means = np.stack([effects[:, factors["template"] == t].mean(1) for t in range(9)])
    oracle = scipy_stats.spearmanr(means.T).statistic
    np.testing.assert_allclose(found.matrix, oracle, atol=1e-12)
    assert found.mean == pytest.approx(oracle[np.tril_indices(9, -1)].mean())
    assert (np.delete(found.matrix[4], 4) < 0).all() and found.n_prompts.tolist() == [16] * 9
    assert across_groups(effects, factors).mean == found.mean  # the last factor of crossed prompts
    few = across_groups(effects[:, :103], {"template": factors["template"][:103]}, least=12)
    assert few.groups.tolist() == [0, 1, 2, 3] and few.n_prompts.tolist() == [12] * 4
    effects[:, 4] = np.nan
    assert np.isfinite(across_groups(effects, factors).mean)
    with pytest.raises(InputError, match="two groups or more of at least 17 prompts, got 0"):
        across_groups(effects, factors, least=17)


def test_rank_correlation_of_two_results() -> None:
    a, factors = planted(0.5, seed=1)
    b, _ = planted(0.5, seed=2)
    found = rank_correlation(a, b, factors, factors, resamples=400)
    assert found.estimate == pytest.approx(scipy_stats.spearmanr(a.mean(1), b.mean(1)).statistic)
    assert 0.9 < found.low < found.estimate < found.high <= 1
    # the true rankings are equal: the estimate is what the noise leaves of 1
    assert found.ceiling == pytest.approx(found.estimate, abs=0.03)
    halves = [split_half(one, factors, seed=seed).spearman_brown for one, seed in ((a, 0), (b, 1_000_003))]
    assert found.ceiling == pytest.approx(math.sqrt(halves[0] * halves[1]))
    opposite = rank_correlation(a, -b, factors, factors, resamples=400)
    assert (opposite.low, opposite.high) == pytest.approx((-found.high, -found.low), abs=1e-9)


def test_rank_correlation_on_the_same_prompts() -> None:
    """Noise that both results share cancels: the interval is narrower than that of noise of their own."""
    a, factors = planted(1.0)
    b = a + np.random.default_rng(5).normal(size=a.shape) * 0.3
    together = rank_correlation(a, b, factors, resamples=300)
    apart = rank_correlation(a, planted(1.0, seed=9)[0], factors, factors, resamples=300)
    assert together.low > 0.99 and together.high - together.low < 0.3 * (apart.high - apart.low)
    assert math.isnan(together.ceiling) and apart.ceiling < 1
    itself = rank_correlation(a, a, factors, resamples=100)
    assert itself.estimate == pytest.approx(1) and itself.high >= itself.estimate
    assert itself.low == pytest.approx(1 - 6 / (len(a) * (len(a) ** 2 - 1)))  # half a swap of neighbours


def test_resamples_that_agree_entirely_do_not_widen_the_interval() -> None:
    """One swap of neighbours in the means, none or one in the resamples; an infinite z among them gave a low of -1."""
    a, factors = planted(0.0, senders=40)
    b = a.copy()
    order = np.argsort(a.mean(1))
    close, noise = order[20:22], np.random.default_rng(3).normal(size=a.shape[1])
    b[close] = a[close].mean(0)
    b[close[0]] += 1e-3 + 1e-2 * noise
    found = rank_correlation(a, b, factors, resamples=400)
    swap = 12 / (40 * (40**2 - 1))
    assert 1 - 1.5 * swap < found.estimate < 1
    assert 1 - 8 * swap < found.low <= found.estimate <= found.high <= 1


@pytest.mark.parametrize("shared", [True, False])
def test_rank_correlation_step_by_step(shared: bool) -> None:
    """The same weights for both results on the same prompts, others for other prompts; scipy for each resample."""
    a, factors = planted(1.0, senders=12)
    b = a + np.random.default_rng(6).normal(size=a.shape)
    found = rank_correlation(a, b, factors, None if shared else factors, resamples=200, seed=3)
    (left,), (right,) = (weight_blocks(Clusters.of(factors), 200, seed) for seed in (3, 3 if shared else 1_000_006))
    draws = [scipy_stats.spearmanr(a @ v, b @ w).statistic for v, w in zip(left, right, strict=True)]
    z, e = np.arctanh(np.clip(draws, -1 + 1e-9, 1 - 1e-9)), np.arctanh(found.estimate)
    low, middle, high = np.quantile(z, [0.025, 0.5, 0.975])
    ends = np.tanh([min(e + low - middle, 2 * e - high), max(e + high - middle, 2 * e - low)])
    np.testing.assert_allclose([found.low, found.high], ends, atol=1e-9)


def test_rank_correlation_covers_the_true_one() -> None:
    """Moderate noise; a percentile interval would cover a fraction of this."""
    rng, hits, runs = np.random.default_rng(0), 0, 60
    _, factors = planted(0.0)
    for run in range(runs):
        true = rng.normal(size=(2, 40))
        true[1] = 0.8 * true[0] + 0.6 * true[1]
        noise = [planted(0.5, seed=2 * run + side + 100)[0] - planted(0.0)[0] for side in (0, 1)]
        found = rank_correlation(
            *(t[:, None] + e for t, e in zip(true, noise, strict=True)), factors, factors, resamples=200
        )
        hits += found.low <= spearman(*true) <= found.high
    assert hits / runs > 0.8


def test_refused_rank_correlations() -> None:
    a, factors = planted(0.1)
    with pytest.raises(InputError, match="senders"):
        rank_correlation(a, a[:5], factors)
    with pytest.raises(InputError, match="or clusters_b"):
        rank_correlation(a, a[:, :50], factors)
    with pytest.raises(InputError, match="at least 5"):
        rank_correlation(a, a, {"pair": factors["pair"] % 4})


def test_overlap_by_hand() -> None:
    """N = 5, |A| = |B| = 2: P(X = 0, 1, 2) = 3, 6, 1 out of 10; mean Jaccard 6/10 * 1/3 + 1/10 * 1."""
    found = overlap([(0, 1), (0, 2)], [Head(0, 2), Head(1, 1)], 5)
    assert found.jaccard == pytest.approx(1 / 3) and found.common == 1 and found.sizes == (2, 2)
    assert found.expected_common == pytest.approx(4 / 5)
    assert found.expected_jaccard == pytest.approx(0.3)
    assert found.p == pytest.approx(0.7)
    assert jaccard([], []) is math.nan or math.isnan(jaccard([], []))
    assert overlap([], [(0, 1)], 5).jaccard == 0 and overlap([], [], 5).p == 1
    with pytest.raises(InputError, match="at least the 3 heads"):
        overlap([(0, 1), (0, 2)], [(0, 3)], 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.data())
def test_overlap_is_hypergeometric(population: int, data: st.DataObject) -> None:
    heads = st.sets(st.integers(0, population - 1))
    a, b = data.draw(heads), data.draw(heads)
    found = overlap(a, b, population)
    oracle = scipy_stats.hypergeom(population, len(a), len(b))
    assert found.p == pytest.approx(oracle.sf(len(a & b) - 1), abs=1e-9)
    shared = range(min(len(a), len(b)) + 1)
    assert found.expected_common == pytest.approx(sum(oracle.pmf(x) * x for x in shared), abs=1e-9)
    expected = sum(oracle.pmf(x) * x / max(len(a) + len(b) - x, 1) for x in shared)
    assert found.expected_jaccard == pytest.approx(expected, abs=1e-9)


def test_overlap_of_a_large_model() -> None:
    """5,120 heads, 250 chosen: no overflow, and near |A| |B| / N."""
    found = overlap(range(250), range(200, 450), 5120)
    assert found.p < 1e-9 and found.expected_jaccard == pytest.approx(12.2 / 487.8, rel=0.05)
