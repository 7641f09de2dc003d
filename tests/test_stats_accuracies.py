"""Accuracies: Wilson's interval, McNemar's test and the clustered difference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyarith.errors import InputError
from pyarith.stats import accuracy_difference, bootstrap_mean, mcnemar, sign_flip, wilson

scipy_stats = pytest.importorskip("scipy.stats")


def answers(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.r_[np.ones(both + only_a, bool), np.zeros(only_b + neither, bool)]
    b = np.r_[np.ones(both, bool), np.zeros(only_a, bool), np.ones(only_b, bool), np.zeros(neither, bool)]
    return a, b


def test_wilson_by_hand() -> None:
    """8 of 10 at 95 %: (0.8 + 0.19207 +- 1.95996 sqrt(0.016 + 0.009604)) / 1.38415 = 0.4902 .. 0.9433."""
    np.testing.assert_allclose(wilson(8, 10), (0.49016, 0.94332), atol=2e-5)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.data(), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_wilson_is_scipys(n: int, data: st.DataObject, level: float) -> None:
    right = data.draw(st.integers(0, n))
    oracle = scipy_stats.binomtest(right, n).proportion_ci(level, method="wilson")
    np.testing.assert_allclose(wilson(right, n, level=level), (oracle.low, oracle.high), atol=1e-12)


def test_mcnemar_by_hand() -> None:
    """Only a 1, only b 5: p = 2 (1 + 6) / 2^6."""
    found = mcnemar(*answers(20, 1, 5, 7))
    assert (found.only_a, found.only_b) == (1, 5) and found.p == 14 / 64
    assert mcnemar(*answers(20, 1, 5, 7), alternative="less").p == 7 / 64
    assert mcnemar(*answers(20, 1, 5, 7), alternative="greater").p == 63 / 64
    assert mcnemar(*answers(3, 0, 0, 3)).p == 1
    assert mcnemar(*answers(0, 4, 4, 0)).p == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 400), st.sampled_from(["two-sided", "less", "greater"]))
def test_mcnemar_is_the_binomial_test(only_a: int, only_b: int, alternative: str) -> None:
    found = mcnemar(*answers(1, only_a, only_b, 2), alternative=alternative)
    m = only_a + only_b
    oracle = scipy_stats.binomtest(only_a, m, 0.5, alternative=alternative).pvalue if m else 1.0
    assert found.p == pytest.approx(oracle, rel=1e-9)


def test_mcnemar_of_many_prompts() -> None:
    found = mcnemar(*answers(0, 5000, 5200, 0))
    assert found.p == pytest.approx(scipy_stats.binomtest(5000, 10_200).pvalue, rel=1e-9)


def test_difference_is_the_bootstrap_of_the_differences() -> None:
    rng = np.random.default_rng(0)
    factors = {"pair": np.repeat(np.arange(12), 8), "template": np.tile(np.arange(8), 12)}
    a, b = rng.random(96) < 0.9, rng.random(96) < 0.6
    found = accuracy_difference(a, b, factors, resamples=1000)
    oracle = bootstrap_mean(a.astype(float) - b, factors, resamples=1000)
    assert found.estimate == pytest.approx(a.mean() - b.mean()) == pytest.approx(found.accuracy_a - found.accuracy_b)
    assert (found.low, found.high, found.se) == (oracle.low, oracle.high, oracle.se)
    assert found.p == sign_flip(a.astype(float) - b, factors, flips=1000).p
    back = accuracy_difference(b, a, factors, resamples=1000)
    assert (back.low, back.high, back.p) == pytest.approx((-found.high, -found.low, found.p))
    assert found.n_clusters == {"pair": 12, "template": 8} and "two-way" in found.method


def test_pairing_makes_the_interval_narrow() -> None:
    """Hard prompts are hard for both: the paired interval is far narrower than the two single ones suggest."""
    hard = np.random.default_rng(1).random(400) < 0.5
    a, b = ~hard, ~hard.copy()
    b[:6] = False
    factors = {"item": np.arange(400)}
    found = accuracy_difference(a, b, factors, resamples=1000)
    alone = bootstrap_mean(a.astype(float), factors, resamples=1000)
    assert found.high - found.low < 0.4 * (alone.high - alone.low)


def test_mcnemar_finds_too_much_on_clusters() -> None:
    """Pairs go right or wrong in all templates together, with no difference on average: single prompts mislead."""
    rng = np.random.default_rng(2)
    pair = np.repeat(np.arange(20), 10)
    false_calls = [0, 0]
    for _ in range(100):
        a, b = (rng.random((2, 20)) < 0.7)[:, pair]
        false_calls[0] += mcnemar(a, b).p < 0.05
        false_calls[1] += accuracy_difference(a, b, {"pair": pair}, resamples=200).p < 0.05
    assert false_calls[0] > 40 and false_calls[1] < 13


def test_refusals() -> None:
    for call, message in (
        (lambda: wilson(3, 2), "at most n = 2"),
        (lambda: wilson(-1, 2), "right"),
        (lambda: wilson(0, 0), "n: expected"),
        (lambda: wilson(1, 2, level=95), "0.95"),
        (lambda: mcnemar([True], [True, False]), r"expected shape \(1,\)"),
        (lambda: mcnemar([0.5, 1], [1, 0]), "right or wrong"),
        (lambda: mcnemar([1, 0], [1, 0], alternative="better"), "two-sided"),
        (lambda: accuracy_difference([1] * 8, [0] * 8, {"pair": [0, 1] * 4}), "at least 5"),
    ):
        with pytest.raises(InputError, match=message):
            call()
