"""Overlap of key heads and rankings on results whose effects are written by hand."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from single_thread import one_thread  # noqa: F401

import pyarith as pa
from pyarith import stats
from pyarith.analysis import overlap
from pyarith.errors import PyarithError

BATCH = 24


def result(effects: Any, noise: float = 0.0, seed: int = 0, clean: Any = 2.0, batch: int = BATCH) -> pa.PatchResult:
    """A result with these mean relative effects [layer, head] and clean logits."""
    effects = np.asarray(effects, np.float64)
    rng = np.random.default_rng(seed)
    clean_logits = np.broadcast_to(np.asarray(clean, np.float64), batch).copy()
    spread = noise * rng.standard_normal((*effects.shape, batch))
    spread -= spread.mean(-1, keepdims=True)
    identity = np.broadcast_to(clean_logits + 0.01, (len(effects), batch))
    return pa.PatchResult(
        clean_logits=clean_logits,
        corrupted_logits=np.zeros(batch),
        clean_log_probs=np.zeros(batch),
        corrupted_log_probs=np.zeros(batch),
        noise_floor=np.zeros(len(effects)),
        head_logits=identity[:, None] + (effects[..., None] + spread) * clean_logits,
        identity_logits=identity,
    )


A = [[-0.3, -0.1, 0.0], [-0.06, 0.02, 0.01]]
B = [[-0.2, 0.03, -0.07], [-0.04, 0.05, 0.01]]
C = [[0.01, 0.02, 0.03], [0.04, 0.05, 0.06]]
D = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]


def three() -> dict[str, pa.PatchResult]:
    return {"+": result(A), "-": result(B), "*": result(C), "/": result(D)}


def test_key_heads_by_threshold() -> None:
    found = overlap(three())
    assert found.key_heads == {"+": ((0, 0), (0, 1), (1, 0)), "-": ((0, 0), (0, 2)), "*": (), "/": ()}
    expected = np.array([[1, 1 / 4, 0, 0], [1 / 4, 1, 0, 0], [0, 0, np.nan, np.nan], [0, 0, np.nan, np.nan]])
    np.testing.assert_allclose(found.jaccard, expected)
    np.testing.assert_array_equal(found.common, [[3, 1, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    # sets of 3 and 2 of 6: they share 1 or 2 with chance 12/15; the mean Jaccard is 9/15 * 1/4 + 3/15 * 2/3
    assert found.p[0, 1] == pytest.approx(12 / 15)
    assert found.expected_jaccard[0, 1] == pytest.approx(9 / 15 / 4 + 3 / 15 * 2 / 3)
    assert found.shared("+", "-") == [(0, 0)] and found.shared("+") == [(0, 0), (0, 1), (1, 0)] and found.shared() == []
    assert found.spearman_low is None and found.settings["key"] == "relative effect below -0.05"
    wider = overlap(three(), threshold=-0.035)
    assert wider.key_heads["-"] == ((0, 0), (0, 2), (1, 0)) and wider.jaccard[0, 1] == pytest.approx(2 / 4)


def test_top_k() -> None:
    found = overlap(three(), k=2)
    assert found.key_heads["*"] == ((0, 0), (0, 1)) and found.key_heads["-"] == ((0, 0), (0, 2))
    assert found.jaccard[0, 1] == pytest.approx(1 / 3) and found.jaccard[2, 0] == 1
    assert found.shared() == [(0, 0)]
    np.testing.assert_array_equal(found.jaccard, found.jaccard.T)


def test_rank_correlation() -> None:
    found = overlap(three())
    for i, j in combinations(range(4), 2):
        expected = spearmanr(np.ravel([A, B, C, D][i]), np.ravel([A, B, C, D][j])).statistic
        assert found.spearman[i, j] == found.spearman[j, i] == pytest.approx(expected)
    assert found.spearman[2, 3] == pytest.approx(1)  # one order, other sizes
    np.testing.assert_array_equal(np.diag(found.spearman), 1)


def test_intervals_are_those_of_stats() -> None:
    pairs = {name: {"pair": np.arange(BATCH) % 8, "template": np.arange(BATCH) // 4} for name in "+-"}
    results = {"+": result(A, 0.3, 1), "-": result(B, 0.3, 2, clean=[-1.0] * 3 + [2.0] * 21)}
    found = overlap(results, pairs=pairs, resamples=200, level=0.9, seed=5)
    effects = [one.head_changes / np.where(one.clean_logits > 0, one.clean_logits, np.nan) for one in results.values()]
    expected = stats.rank_correlation(*effects[::-1], pairs["-"], pairs["+"], resamples=200, level=0.9, seed=5)
    assert (found.spearman_low[0, 1], found.spearman_high[1, 0]) == (expected.low, expected.high)
    assert found.spearman[0, 1] == pytest.approx(expected.estimate)
    assert found.spearman_low[0, 1] < found.spearman[0, 1] < found.spearman_high[0, 1]
    assert np.isnan(np.diag(found.spearman_low)).all() and found.settings["level"] == 0.9
    # the same prompts are resampled together
    same = overlap(results, pairs=dict.fromkeys("+-", pairs["+"]), resamples=200, level=0.9, seed=5)
    together = stats.rank_correlation(*effects[::-1], pairs["+"], resamples=200, level=0.9, seed=5)
    assert (same.spearman_low[0, 1], same.spearman_high[0, 1]) == (together.low, together.high)
    assert same.spearman_low[0, 1] != found.spearman_low[0, 1]
    assert "[" in repr(same) and "Spearman" in repr(same)


def test_table() -> None:
    table = list(overlap(three(), k=2).rows())
    assert [(row["a"], row["b"]) for row in table] == list(combinations("+-*/", 2))
    assert table[0]["jaccard"] == pytest.approx(1 / 3) and np.isnan(table[0]["spearman_low"])
    assert "1 of 3 and 2 heads shared" in repr(overlap(three()))


def test_on_the_demo_model() -> None:
    model, tokenizer = pa.load_demo()
    pairs = {sign: pa.tasks.arithmetic(tokenizer, sign, n=40) for sign in "+*"}
    results = {
        sign: pa.fast_patch(model, **one.inputs(), senders=("heads",), progress=False, verify=0)
        for sign, one in pairs.items()
    }
    found = overlap(results, k=5, pairs=pairs, resamples=100)
    assert found.common[0, 1] == len(found.shared()) and found.common[0, 0] == 5
    own = stats.spearman(results["+"].head_effects, results["*"].head_effects)
    assert found.spearman[0, 1] == pytest.approx(own)
    assert found.spearman_low[0, 1] <= found.spearman_high[0, 1]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "one": ({"results": {"+": result(A)}}, r"two or more, got \['\+'\]"),
    "list": ({"results": [result(A), result(B)]}, "expected a mapping, got list"),
    "type": ({"results": {"+": result(A), "-": 3}}, r"expected PatchResults, got \{'-': 'int'\}"),
    "shapes": ({"results": {"+": result(A), "-": result(np.zeros((3, 2)))}}, r"'\+': \(2, 3\), '-': \(3, 2\)"),
    "negative": ({"results": {"+": result(A), "-": result(B, clean=-1.0)}}, r"in \['-'\] every clean answer logit"),
    "k": ({"k": 7}, "k: expected 1 to 6, the number of heads, got 7"),
    "k-zero": ({"k": 0}, "k: expected 1 to 6"),
    "pairs-missing": ({"pairs": {"+": None}}, r"missing=\['-', '\*', '/'\]"),
    "pairs-unknown": ({"pairs": dict.fromkeys("+-*/x")}, r"unknown=\['x'\]"),
    "pairs-length": ({"pairs": {sign: {"item": range(7)} for sign in "+-*/"}}, "expected equal lengths|expected 24"),
    "pairs-few": ({"pairs": {sign: {"item": [0] * BATCH} for sign in "+-*/"}}, "at least 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(PyarithError, match=message):
        overlap(**{"results": three(), **changes})


def test_results_without_heads() -> None:
    bare = dataclasses.replace(result(A), head_logits=None, identity_logits=None)
    with pytest.raises(PyarithError, match=r"heads among the senders, \['-'\] have none"):
        overlap({"+": result(A), "-": bare})
    with pytest.raises(PyarithError, match=r"names: expected some of .* got \['x'\]"):
        overlap(three()).shared("x")
