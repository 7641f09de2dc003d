"""Models whose circuit is known: the ranking and the magnitudes must be exact."""

from __future__ import annotations

from itertools import product
from typing import Any

import literal_oracle
import numpy as np
import planted
import pytest
import torch
from planted import KEY_HEADS, KEY_MLP, LOGIT, SUM0, problem
from single_thread import one_thread  # noqa: F401
from tiny_models import Prompt, inputs
from true_fp64 import true_fp64

import pyarith as pa

FIXED = {"progress": False, "verify": 0}


def corrupt(a: int, b: int, family: str) -> tuple[int, int]:
    return ((a + 2) % 5 if "a" in family else a), ((b + 1) % 5 if "b" in family else b)


def addition(family: str, side: str = "none") -> dict[str, Any]:
    """All problems whose sum the corruption changes; under padding they differ in length."""
    pairs, answers = [], []
    for a, b in product(range(5), range(5)):
        other = corrupt(a, b, family)
        fill = (a + b) % 3 if side != "none" else 0
        if sum(other) != a + b:
            pairs.append(Prompt(problem(a, b, fill), problem(*other, fill)))
            answers.append(SUM0 + a + b)
    return inputs(pairs, answers, side)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", ["a", "b", "ab"])
def test_adder(family: str, side: str) -> None:
    model = planted.adder()
    with true_fp64():
        result = pa.fast_patch(model, **addition(family, side), **FIXED)
    expected = np.zeros((4, 4))
    for head in KEY_HEADS[family]:
        expected[head] = -1.0
    np.testing.assert_allclose(result.clean_logits, LOGIT, rtol=1e-12)
    np.testing.assert_allclose(result.corrupted_logits, 0, atol=1e-10)
    np.testing.assert_allclose(result.head_effects, expected, atol=1e-10)
    np.testing.assert_allclose(result.mlp_effects, [0, 0, 0, -1], atol=1e-10)
    # prompt by prompt, not only on average
    np.testing.assert_allclose(
        result.head_logits, LOGIT * (1 + np.repeat(expected[..., None], result.head_logits.shape[-1], -1)), atol=1e-9
    )
    assert sorted(map(tuple, result.key_heads())) == KEY_HEADS[family]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adder_ranking(dtype: torch.dtype) -> None:
    result = pa.fast_patch(planted.adder().to(dtype), **addition("ab"), **FIXED)
    small = {torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype]
    rest = np.ones((4, 4), dtype=bool)
    for head in KEY_HEADS["ab"]:
        rest[head] = False
        np.testing.assert_allclose(result.head_effects[head], -1, atol=1e-2)
    assert np.abs(result.head_effects[rest]).max() < small
    assert np.abs(result.mlp_effects[:KEY_MLP]).max() < small
    assert sorted(map(tuple, result.key_heads())) == KEY_HEADS["ab"]
    assert {tuple(row.head) for row in result.top(2)} == set(KEY_HEADS["ab"])


def test_frozen_is_the_direct_path() -> None:
    """The movers act through MLP 3 alone, so with frozen MLPs no head has an effect and MLP 3 keeps its own."""
    model = planted.adder()
    with true_fp64():
        result = pa.fast_patch(model, **addition("ab"), mlps="frozen", **FIXED)
    np.testing.assert_allclose(result.head_effects, 0, atol=1e-10)
    np.testing.assert_allclose(result.mlp_effects, [0, 0, 0, -1], atol=1e-10)
    assert result.key_heads() == []


def test_head_behind_a_head() -> None:
    """0.1 matters (patched with nothing frozen it removes the answer) but only through 1.2: effect 0."""
    model, clean_ids, corrupted_ids = planted.adder(), problem(1, 2), problem(3, 2)
    with true_fp64():
        clean = literal_oracle.forward(model, clean_ids)
        corrupted = literal_oracle.forward(model, corrupted_ids)
        z = clean.z[0].clone()
        z[..., 16:32] = corrupted.z[0][..., 16:32]  # head 1, all positions
        total = literal_oracle.forward(model, clean_ids, z={0: z}).logits[SUM0 + 3]
        result = pa.fast_patch(model, **addition("a"), **FIXED)
    assert abs(total) < 1e-10
    assert np.abs(result.head_effects[0]).max() < 1e-10


@pytest.mark.parametrize("mlps", ["recomputed", "frozen"])
def test_voters(mlps: str) -> None:
    """Magnitudes from a formula on paper: the final norm is recomputed for every patch."""
    model, (n_layers, n_heads) = planted.voters(), planted.WEIGHTS.shape
    pairs = [Prompt(problem(a, b), problem((a + 1 + b) % 5, b)) for a in range(5) for b in range(3)]
    answers = [SUM0 + a for a in range(5) for _ in range(3)]
    with true_fp64():
        result = pa.fast_patch(model, **inputs(pairs, answers), mlps=mlps, **FIXED)
    patched = planted.voters_logit(planted.WEIGHTS).numpy()
    clean = planted.voters_logit(torch.zeros(())).item()
    np.testing.assert_allclose(result.clean_logits, clean, rtol=1e-12)
    np.testing.assert_allclose(
        result.head_logits, np.repeat(patched[..., None], len(pairs), -1), rtol=1e-12, atol=1e-13
    )
    np.testing.assert_allclose(result.head_effects, patched / clean - 1, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(result.mlp_effects, np.zeros(n_layers), atol=1e-14)
    weights = planted.WEIGHTS.numpy()
    assert np.all(result.head_effects[weights > 0] < 0)
    assert np.all(result.head_effects[weights < 0] > 0)  # a head that votes against the answer: the sign is kept
    assert result.head_effects.shape == (n_layers, n_heads)


def test_silent_head_is_exactly_zero() -> None:
    """W_O = 0: the patched row is the identity row, bit for bit, in any dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        result = pa.fast_patch(planted.adder().to(dtype), **addition("ab"), **FIXED)
        np.testing.assert_array_equal(
            result.head_logits[3], np.broadcast_to(result.identity_logits[3], (4, result.head_logits.shape[-1]))
        )
