"""Cosines of MLPs with unembedding rows, and the three points of a curve."""

from __future__ import annotations

import numpy as np
import planted
import pytest
import torch
from plain_runs import ANSWERS, EXACT, OPERANDS, SIDES, given, runs
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from tiny_models import NAMES, make
from tokenizers_for_tests import byte_level
from true_fp64 import true_fp64

import pyarith as pa
from pyarith.analysis import mlp_cosines, three_points
from pyarith.errors import PyarithError


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_cosines(name: str, side: str) -> None:
    model = make(name)
    with true_fp64(), unchanged(model):
        result = mlp_cosines(model, operands=OPERANDS, **given(side))
    w_u = model.get_output_embeddings().weight.detach()
    cosine = torch.nn.CosineSimilarity(dim=-1, eps=0)
    for b, run in enumerate(runs(name, side)):
        for curve, vectors, token in (
            (result.operand_a, run.mlp_in, OPERANDS[b, 0]),
            (result.operand_b, run.mlp_in, OPERANDS[b, 1]),
            (result.answer, run.mlp, ANSWERS[b]),
        ):
            np.testing.assert_allclose(curve[:, b], cosine(vectors, w_u[token]).numpy(), **EXACT)
    np.testing.assert_allclose(result.mean["answer"], result.answer.mean(1), rtol=1e-14)
    np.testing.assert_allclose(result.spread["operand_a"], result.operand_a.std(1), rtol=1e-14)
    assert len(list(result.rows())) == len(result.answer) and "start-inflection-end" in repr(result)


def test_planted_adder_has_its_answer_in_one_mlp() -> None:
    """The sum is written by MLP 3 along W_U[sum] and nothing else is; operands have other codes than W_U."""
    model = planted.adder()
    problems = [(a, b) for a in range(5) for b in range(5)]
    answers = [planted.SUM0 + a + b for a, b in problems]
    operands = [[planted.A + a, planted.B + b] for a, b in problems]
    with torch.no_grad():  # operands unembedded along the codes that the movers write
        for i in range(5):
            model.lm_head.weight[planted.A + i, planted.AT_A + i] = 1.0
            model.lm_head.weight[planted.B + i, planted.AT_B + i] = 1.0
    with true_fp64():
        result = mlp_cosines(
            model, torch.tensor([planted.problem(*p) for p in problems]), answers=answers, operands=operands
        )
    # |stream| before MLP l is sqrt(2, 3, 4, 4): a arrives in layer 1, b in layer 2
    expected = {"operand_a": [0, 3**-0.5, 0.5, 0.5], "operand_b": [0, 0, 0.5, 0.5], "answer": [0, 0, 0, 1]}
    for name, curve in expected.items():
        np.testing.assert_allclose(getattr(result, name), np.repeat(np.array(curve)[:, None], 25, 1), atol=1e-12)
    assert result.points == (3, 3, 3)


CURVES: dict[str, tuple[list[float], tuple[int, int, int] | None]] = {
    "step": ([0, 0, 1, 1], (2, 2, 2)),
    "ramp": ([0.0, 0.05, 0.2, 0.3, 0.8, 0.95, 1.0], (2, 4, 5)),
    "below-zero": ([-0.2, -0.2, 0.1, 0.8, 0.75], (2, 3, 3)),
    "bump-before": ([0.5, 0.0, 0.0, 0.4, 1.0, 0.2], (3, 4, 4)),
    "dip-in-the-rise": ([0.0, 0.5, 0.05, 0.6, 1.0], (3, 3, 4)),
    "top-first": ([1.0, 0.5, 0.0], (0, 0, 0)),
    "high-from-the-first": ([5.0, 5.2, 10.0, 4.0], (0, 2, 2)),
    "equal-steps": ([0.0, 0.5, 1.0], (1, 1, 2)),
    "exactly-at-the-shares": ([0.0, 1.0, 9.0, 10.0], (1, 2, 2)),
    "flat": ([0.3, 0.3], None),
    "nan": ([0.3, float("nan")], None),
}


@pytest.mark.parametrize("case", CURVES)
def test_three_points(case: str) -> None:
    curve, expected = CURVES[case]
    assert three_points(curve) == expected
    if expected is not None:
        assert expected[0] <= expected[1] <= expected[2] <= int(np.argmax(curve))
        assert three_points(np.array(curve) * 3 - 1) == expected


def test_operands_come_from_roles() -> None:
    model, tokenizer = pa.load_demo()
    pairs = pa.tasks.arithmetic(tokenizer, n=30)
    result = mlp_cosines(model, pairs)
    operands = [
        [int(ids[roles == code][0]) for code in (1, 2)] for ids, roles in zip(pairs.clean, pairs.roles, strict=True)
    ]
    assert [tokenizer.decode([a]) for a, _ in operands] == [str(a) for a in pairs.strata["operand_a"]]
    same = mlp_cosines(
        model, pairs.clean, attention_mask=pairs.attention_mask, answers=pairs.answers, operands=operands
    )
    np.testing.assert_array_equal(result.operand_a, same.operand_a)
    np.testing.assert_array_equal(result.operand_b, same.operand_b)
    np.testing.assert_array_equal(result.answer, same.answer)


def test_bad_operands() -> None:
    model = make("llama")
    with pytest.raises(PyarithError, match=r"operands: expected \[batch, 2\] = \[4, 2\], got \[4, 3\]"):
        mlp_cosines(model, operands=torch.ones(4, 3, dtype=torch.int64), **given("left"))
    with pytest.raises(PyarithError, match="roles: expected the role of every token"):
        mlp_cosines(model, **given("left"))
    tokenizer = byte_level(split_digits=True)
    pairs = pa.tasks.arithmetic(tokenizer, operator="-", n=20, operands=(5, 12), styles=("equation",))
    first = int(np.flatnonzero(pairs.strata["operand_a"] > 9)[0])
    with pytest.raises(PyarithError, match=rf"one token with the role 'operand_a'.*\b{first}\b"):
        mlp_cosines(make("llama", vocab_size=int(pairs.clean.max()) + 1), pairs)
