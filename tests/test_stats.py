"""Factors of prompts, and the confidence of a result."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from single_thread import one_thread  # noqa: F401

import pyarith as pa
from pyarith.errors import InputError
from pyarith.stats import Clusters, Confidence, adjust_together, bootstrap_mean, confidence, sign_flip
from pyarith.stats.clusters import group_sums

LAYERS, HEADS, PAIRS, TEMPLATES = 3, 4, 12, 9
BATCH = PAIRS * TEMPLATES
FACTORS = {"pair": np.repeat(np.arange(PAIRS), TEMPLATES), "template": np.tile(np.arange(TEMPLATES), PAIRS)}
KEYS = [pa.Head(1, 2), pa.Head(2, 0)]


def result_of(dtype: Any = np.float32, negative: int = 0, senders: str = "both", **options: Any) -> pa.PatchResult:
    """A result with two key heads (-30 %, -12 %), one that is near the threshold, and one key MLP."""
    rng = np.random.default_rng(0)
    noise = 0.02 * rng.normal(size=(LAYERS, HEADS, PAIRS))[..., FACTORS["pair"]]
    effect = noise + 0.02 * rng.normal(size=(LAYERS, HEADS, BATCH))
    for head, size in zip([*KEYS, (0, 1)], (-0.30, -0.12, -0.052), strict=True):
        effect[head] += size
    mlps = 0.02 * rng.normal(size=(LAYERS, BATCH)) + np.array([0.0, -0.4, 0.3])[:, None]
    clean = rng.uniform(8, 12, BATCH)
    clean[:negative] = -1.0
    identity = clean + 0.001 * rng.normal(size=(LAYERS, BATCH))
    zeros, given = np.zeros(BATCH, dtype), {}
    if senders != "mlps":
        given |= {
            "head_logits": (identity[:, None] + effect * clean).astype(dtype),
            "identity_logits": identity.astype(dtype),
        }
    if senders != "heads":
        given |= {"mlp_logits": (identity + mlps * clean).astype(dtype), "mlp_identity_logits": identity.astype(dtype)}
    clean = clean.astype(dtype)
    return pa.PatchResult(clean, clean, zeros, zeros, np.zeros(LAYERS, dtype), **given, **options)


# factors


def test_factors_from_strata() -> None:
    strata = {"pair": np.array(["1,2", "3,4", "1,2"]), "template": np.array(["b", "a", "a"]), "item": np.arange(3)}
    found = Clusters.of(SimpleNamespace(strata=strata))
    assert found.names == ("pair", "template") and found.sizes == {"pair": 2, "template": 2}
    assert [codes.tolist() for codes in found.codes] == [[0, 1, 0], [1, 0, 0]]
    operands = {"operand_a": [1, 3, 1], "operand_b": [2, 4, 2], "template": strata["template"]}
    assert Clusters.of(SimpleNamespace(strata=operands)).codes[0].tolist() == [0, 1, 0]
    assert Clusters.of(SimpleNamespace(strata={"item": strata["item"]})).names == ("item",)
    assert found.n_repeated == 0 and len(found) == 3
    assert found.take(np.array([0, 2])).sizes == {"pair": 1, "template": 2}
    assert found.only("template").names == ("template",)


def test_factors_of_several_batches() -> None:
    batches = [SimpleNamespace(strata={"pair": [1, 2], "template": ["x", "y"]}) for _ in range(3)]
    assert Clusters.of(batches).codes[0].tolist() == [0, 1] * 3
    assert Clusters.of(batches).n_repeated == 4
    with pytest.raises(InputError, match="same strata in every batch"):
        Clusters.of([*batches, SimpleNamespace(strata={"item": [1]})])


def test_factors_as_they_are() -> None:
    assert Clusters.of(["x", "y", "x"]).codes[0].tolist() == [0, 1, 0]
    assert Clusters.of({"item": range(4)}).sizes == {"item": 4}
    same = Clusters.of(FACTORS)
    assert Clusters.of(same) is same


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            SimpleNamespace(strata={"style": [1, 2]}),
            r"expected strata pair and template, or item, got \['style'\].*from_text",
        ),
        (SimpleNamespace(strata={"pair": [1, 2]}), "got .'pair'"),
        ({"a": [1], "b": [1], "c": [1]}, "one or two factors, got 3"),
        ({}, "one or two factors, got 0"),
        (3, "got int"),
        ("abc", "got str"),
        ({"pair": np.zeros((2, 2))}, r"shape \(2, 2\)"),
        ({"pair": [1, 2], "template": [1]}, "equal lengths"),
        ({"item": []}, "at least one prompt"),
    ],
)
def test_missing_factors_say_what_to_do(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Clusters.of(source)


def test_group_sums() -> None:
    values, codes = np.random.default_rng(0).normal(size=(3, 20)), np.random.default_rng(1).integers(0, 6, 20)
    expected = np.stack([values[:, codes == group].sum(1) for group in range(8)], 1)
    np.testing.assert_allclose(group_sums(values, codes, 8), expected, atol=1e-14)


# the confidence of a result


def test_estimates_are_the_effects_of_the_result() -> None:
    for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-13)):
        result = result_of(dtype, negative=5)
        found = result.confidence(FACTORS, resamples=500)
        np.testing.assert_allclose(found.heads.estimate, result.head_effects, atol=tolerance)
        np.testing.assert_allclose(found.mlps.estimate, result.mlp_effects, atol=tolerance)
        logits = result.confidence(FACTORS, resamples=500, metric="logit")
        np.testing.assert_allclose(logits.heads.estimate, result.head_changes.mean(-1), atol=10 * tolerance)
        assert found.n_prompts == BATCH - 5 and logits.n_prompts == BATCH and "5 prompts left out" in found.method


def test_parts_are_put_together_as_documented() -> None:
    result = result_of(np.float64)
    found = result.confidence(FACTORS, resamples=500, seed=3, level=0.9)
    flat = np.concatenate(
        [(c / result.clean_logits).reshape(-1, BATCH) for c in (result.head_changes, result.mlp_changes)]
    )
    interval = bootstrap_mean(flat, FACTORS, resamples=500, seed=3, level=0.9)
    p = sign_flip(flat, FACTORS, seed=3, flips=500).p
    (adjusted,) = adjust_together(p)
    for at, sender in ((slice(0, LAYERS * HEADS), found.heads), (slice(LAYERS * HEADS, None), found.mlps)):
        shape = sender.estimate.shape
        for name, expected in (("low", interval.low), ("high", interval.high), ("se", interval.se), ("p", p)):
            np.testing.assert_array_equal(getattr(sender, name), expected[at].reshape(shape), err_msg=name)
        np.testing.assert_array_equal(sender.p_adjusted, adjusted[at].reshape(shape))
    assert found.heads.low.shape == (LAYERS, HEADS) and found.mlps.p.shape == (LAYERS,)
    assert found.n_clusters == {"pair": PAIRS, "template": TEMPLATES} and found.level == 0.9


def test_key_heads_are_below_the_threshold_for_sure() -> None:
    result = result_of()
    found = result.confidence(FACTORS, resamples=1000)
    assert (0, 1) in result.key_heads()  # the point estimate says -5.2 %
    assert found.heads.high[0, 1] > -0.05 and found.heads.p_adjusted[0, 1] < 0.05
    assert found.key_heads() == KEYS  # strongest first, and the one near the threshold is not among them
    assert found.key_heads(-0.2) == KEYS[:1] and found.key_heads(alpha=1e-9) == []
    assert found.key_mlps() == [1]
    logits = result.confidence(FACTORS, resamples=1000, metric="logit")
    assert logits.key_heads(-0.5) == KEYS
    with pytest.raises(InputError, match="number of logits"):
        logits.key_heads()


def test_one_kind_of_sender() -> None:
    heads, mlps = (result_of(senders=kind).confidence(FACTORS, resamples=200) for kind in ("heads", "mlps"))
    assert heads.mlps is None and mlps.heads is None
    with pytest.raises(InputError, match="heads were not among the senders"):
        mlps.key_heads()
    with pytest.raises(InputError, match="MLPs were not among the senders"):
        heads.key_mlps()
    with pytest.raises(InputError, match="neither"):
        confidence(None, None, FACTORS)


def test_reads_well_and_is_frozen() -> None:
    found = result_of().confidence(FACTORS, resamples=200)
    text = repr(found)
    assert isinstance(found, Confidence)
    for part in (
        "12 of pair and 9 of template",
        "200 resamples",
        "1.2",
        "MLP   1",
        "Benjamini-Hochberg over 15 senders",
    ):
        assert part in text
    with pytest.raises(FrozenInstanceError):
        found.level = 0.5


def test_one_head_of_a_large_model_can_pass_the_correction() -> None:
    """500 heads and one effect: with as many flips as resamples the smallest adjusted p would be 500 / 101 > 0.05."""
    effects = np.random.default_rng(0).normal(size=(20, 25, 60))
    effects[3, 7] -= 3
    found = confidence(effects, None, {"item": np.arange(60)}, resamples=100)
    assert found.heads.p_adjusted[3, 7] < 0.05 and found.key_heads() == [(3, 7)]


def test_refusals() -> None:
    result = result_of()
    few = {"pair": FACTORS["pair"] % 3, "template": FACTORS["template"]}
    for change, message in (
        ({"pairs": {"pair": [1, 2]}}, f"expected {BATCH} values"),
        ({"pairs": few}, "at least 5 of each factor, got {'pair': 3}"),
        ({"metric": "probability"}, "metric"),
        ({"level": 95}, "level"),
        ({"resamples": 5}, "resamples"),
        ({"pairs": SimpleNamespace(strata={})}, "expected strata"),
    ):
        arguments = {"pairs": FACTORS, **change}
        with pytest.raises(InputError, match=message):
            result.confidence(arguments.pop("pairs"), **arguments)
    with pytest.raises(InputError, match="every prompt is left out"):
        result_of(negative=BATCH).confidence(FACTORS)


def test_merged_results_want_their_batches() -> None:
    """Length buckets put the prompts in another order than the pairs had: one PromptPairs is refused."""
    parts = [result_of(), result_of()]
    merged = pa.PatchResult.merge(parts)
    strata = SimpleNamespace(strata=FACTORS)
    twice = SimpleNamespace(strata={name: np.tile(values, 2) for name, values in FACTORS.items()})
    with pytest.raises(InputError, match="list of 2 PromptPairs"):
        merged.confidence(twice)
    found = merged.confidence([strata, strata], resamples=200)
    assert found.n_prompts == 2 * BATCH and f"{BATCH} of them repeated" in found.method
    np.testing.assert_allclose(found.heads.low, parts[0].confidence(FACTORS, resamples=200).heads.low, atol=1e-9)


def test_on_the_demo_model() -> None:
    """Pairs of a task as they come; buckets as a list; the interval holds the estimate."""
    model, tokenizer = pa.load_demo()
    pairs = pa.tasks.arithmetic(tokenizer, "+", "operands", n=60)
    result = pa.fast_patch(model, pairs, progress=False, verify=0)
    found = result.confidence(pairs, resamples=300)
    np.testing.assert_allclose(found.heads.estimate, result.head_effects, atol=1e-6)
    assert (found.heads.low <= found.heads.estimate).all() and (found.heads.estimate <= found.heads.high).all()
    assert found.key_heads() and set(found.key_heads()) <= set(result.key_heads())
    buckets = pairs.buckets()
    merged = pa.fast_patch(model, buckets, progress=False, verify=0).confidence(buckets, resamples=300)
    np.testing.assert_allclose(merged.heads.high, found.heads.high, atol=1e-4)
