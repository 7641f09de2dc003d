"""Sign flips against brute force and scipy; Benjamini-Hochberg against scipy and by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyarith.errors import InputError
from pyarith.stats import adjust_together, benjamini_hochberg, sign_flip, signs

ALTERNATIVES = ("two-sided", "less", "greater")


def brute_force(effects: np.ndarray, groups: np.ndarray, alternative: str, null: float = 0.0) -> float:
    """Flip every pattern of the groups by hand and recompute the mean of the prompts."""
    names = sorted(set(groups))
    means = []
    for pattern in product((1, -1), repeat=len(names)):
        sign = np.array([pattern[names.index(group)] for group in groups])
        means.append(np.nanmean(sign * (effects - null)))
    observed, means, slack = means[0], np.array(means), 1e-12
    beyond = {
        "two-sided": np.abs(means) >= abs(observed) - slack,
        "less": means <= observed + slack,
        "greater": means >= observed - slack,
    }
    return float(beyond[alternative].mean())


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_against_brute_force(alternative: str) -> None:
    rng = np.random.default_rng(0)
    effects, groups = rng.normal(size=(4, 25)) - 0.3, rng.integers(0, 7, 25)
    effects[1, [3, 8]] = np.nan
    effects[2] = np.round(effects[2])  # many ties
    effects[3] = 0
    for null in (0.0, -0.25):
        found = sign_flip(effects, {"pair": groups}, alternative=alternative, null=null)
        assert found.exact and found.n_patterns == 128
        expected = [brute_force(row, groups, alternative, null) for row in effects]
        np.testing.assert_allclose(found.p, expected, rtol=1e-14)
    assert sign_flip(effects[3], {"pair": groups}, alternative=alternative).p == 1


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_against_scipy(alternative: str) -> None:
    """One prompt a pair, exactly; with several prompts a pair, scipy gets their sums."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(11), 3)
    effects = rng.normal(size=33) + 0.4
    sums = effects.reshape(11, 3).sum(1)
    options = {"permutation_type": "samples", "alternative": alternative, "n_resamples": np.inf}
    oracle = stats.permutation_test((sums,), np.sum, **options)
    assert sign_flip(effects, {"pair": groups}, alternative=alternative).p == pytest.approx(oracle.pvalue, abs=1e-14)


def test_ties_are_ties_in_floating_point() -> None:
    """Tenths and the same numbers as whole ones, where no sum is rounded: equal p-values."""
    whole = np.random.default_rng(8).integers(-5, 6, (40, 10)).astype(float)
    for alternative in ALTERNATIVES:
        exact, tenths = (
            sign_flip(one, {"pair": np.arange(10)}, alternative=alternative).p for one in (whole, whole / 10)
        )
        np.testing.assert_array_equal(tenths, exact)


def test_only_the_first_factor_is_flipped() -> None:
    effects, groups = np.random.default_rng(2).normal(size=24), np.arange(24) % 6
    both = sign_flip(effects, {"pair": groups, "template": np.arange(24) // 6})
    assert both.p == sign_flip(effects, {"pair": groups}).p == brute_force(effects, groups, "two-sided")


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_random_patterns_come_near_all_patterns(alternative: str, monkeypatch: pytest.MonkeyPatch) -> None:
    effects, groups = np.random.default_rng(3).normal(size=(6, 60)) + 0.15, np.arange(60) % 15
    every = sign_flip(effects, {"pair": groups}, alternative=alternative, flips=2**15)
    monkeypatch.setattr(signs, "_EXACT", 2)
    some = sign_flip(effects, {"pair": groups}, alternative=alternative, flips=20_000)
    assert every.exact and not some.exact
    np.testing.assert_allclose(some.p, every.p, atol=4 * 0.5 / np.sqrt(20_000))
    monkeypatch.setattr(signs, "_BLOCK_BYTES", 8 * 15 * 101)  # 101 patterns at a time
    np.testing.assert_array_equal(sign_flip(effects, {"pair": groups}, alternative=alternative, flips=20_000).p, some.p)


def test_p_is_never_zero() -> None:
    found = sign_flip(np.ones((2, 60)), {"pair": np.arange(60)}, flips=999)
    np.testing.assert_array_equal(found.p, 1 / 1000)  # (1 + 0) / (1 + 999)
    assert not found.exact and "999 random" in found.method
    small = sign_flip(np.ones(6), {"pair": np.arange(6)})
    assert small.p == 2 / 64  # the pattern itself and its opposite


def test_level_under_the_null() -> None:
    """Sums of pairs symmetric about 0: 5 % of p-values are below 5 %. Single prompts as clusters find far more."""
    rng, groups = np.random.default_rng(4), np.repeat(np.arange(20), 10)
    effects = rng.normal(size=(3000, 20))[:, groups] + rng.normal(size=(3000, 200))
    rejected = (sign_flip(effects, {"pair": groups}, flips=999).p <= 0.05).mean()
    assert 0.036 < rejected < 0.064  # 3.5 standard errors
    assert (sign_flip(effects, {"item": np.arange(200)}, flips=999).p <= 0.05).mean() > 0.3


def test_missing_values() -> None:
    effects = np.array([[1.0, np.nan, 2, 3, 4, 5], [np.nan] * 6])
    found = sign_flip(effects, {"pair": np.arange(6)})
    assert found.p[0] == pytest.approx(2 / 32)  # the pair without a value plays no part
    assert np.isnan(found.p[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alternative": "both"}, "two-sided"),
        ({"flips": 10}, "flips"),
        ({"clusters": {"pair": [0] * 6}}, "at least 2 of pair"),
        ({"clusters": {"pair": [0, 1]}}, "expected 6 values"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments = {"clusters": {"pair": np.arange(6)}, **change}
    with pytest.raises(InputError, match=message):
        sign_flip(np.ones(6), arguments.pop("clusters"), **arguments)


def test_benjamini_hochberg_by_hand() -> None:
    """m = 4: 0.01 * 4 / 1, then 0.02 * 4 / 2 = 0.04, 0.03 * 4 / 3 = 0.04, 0.5 * 4 / 4."""
    np.testing.assert_allclose(benjamini_hochberg([0.03, 0.01, 0.5, 0.02]), [0.04, 0.04, 0.5, 0.04])
    # the smaller of two adjusted values is passed down: 0.02 * 3 = 0.06, 0.021 * 3 / 2 = 0.0315, 0.03 * 3 / 3
    np.testing.assert_allclose(benjamini_hochberg([0.02, 0.021, 0.03]), [0.03, 0.03, 0.03])
    np.testing.assert_allclose(benjamini_hochberg([0.02, np.nan, 0.04]), [0.04, np.nan, 0.04])
    assert benjamini_hochberg(np.full((2, 2), np.nan)).shape == (2, 2)
    assert benjamini_hochberg([]).shape == (0,)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.sampled_from(["bh", "by"]))
def test_benjamini_hochberg_is_scipys(values: list[float], method: str) -> None:
    stats = pytest.importorskip("scipy.stats")
    found = benjamini_hochberg(values, method=method)
    np.testing.assert_allclose(found, stats.false_discovery_control(values, method=method), rtol=1e-12, atol=1e-300)
    assert (found >= np.array(values) * (1 - 1e-12)).all()


def test_heads_and_mlps_are_one_family() -> None:
    rng = np.random.default_rng(5)
    heads, mlps = rng.uniform(size=(4, 6)) ** 3, rng.uniform(size=4) ** 3
    heads[1, 2] = np.nan
    joint = benjamini_hochberg(np.r_[heads.reshape(-1), mlps])
    a, none, b = adjust_together(heads, None, mlps)
    np.testing.assert_array_equal(a, joint[:24].reshape(4, 6))
    np.testing.assert_array_equal(b, joint[24:])
    assert none is None and adjust_together(None) == (None,)
    assert (np.nan_to_num(a) != np.nan_to_num(benjamini_hochberg(heads))).any()


def test_bad_p_values() -> None:
    for p, message in (([0.2, 1.2], r"1\.2"), ([-0.1], "0 .. 1")):
        with pytest.raises(InputError, match=message):
            benjamini_hochberg(p)
    with pytest.raises(InputError, match="method"):
        benjamini_hochberg([0.1], method="holm")
