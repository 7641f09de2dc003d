"""Logit lens against the model's own final norm and unembedding, and on a planted circuit."""

from __future__ import annotations

import numpy as np
import planted
import pytest
import torch
from plain_runs import ANSWERS, EXACT, SIDES, capped, final_norm, given, logit_scale, runs
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from tiny_models import NAMES, make
from true_fp64 import true_fp64

import pyarith as pa
from pyarith.analysis import logit_lens
from pyarith.errors import PyarithError


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_lens(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarith.analysis.lens as module

    monkeypatch.setattr(module, "_LOGITS", 200)  # one prompt at a time
    model = make(name)
    with true_fp64(), unchanged(model):
        result = logit_lens(model, k=5, **given(side))
    for b, run in enumerate(runs(name, side)):
        with true_fp64(), torch.no_grad():
            streams = torch.stack([run.post - run.mlp, run.post], 1)
            unembedded = model.get_output_embeddings()(final_norm(model)(streams))
            logits = capped(model, unembedded * logit_scale(model))
        np.testing.assert_allclose(logits[-1, 1].numpy(), run.logits.numpy(), **EXACT)
        chances = logits.softmax(-1).numpy()
        values = logits.numpy()
        order = np.argsort(-values, -1)
        np.testing.assert_array_equal(result.tokens[:, :, b], order[..., :5])
        np.testing.assert_allclose(
            result.probabilities[:, :, b], np.take_along_axis(chances, order[..., :5], -1), **EXACT
        )
        answer = int(ANSWERS[b])
        np.testing.assert_allclose(result.answer_probabilities[:, :, b], chances[..., answer], **EXACT)
        ranks = np.argmax(order == answer, -1)
        np.testing.assert_array_equal(result.answer_ranks[:, :, b], ranks)
        rise = values[:, 1] - values[:, 0]
        best = np.argsort(-rise, -1)[:, :5]
        np.testing.assert_array_equal(result.promoted[:, b], best)
        np.testing.assert_allclose(result.promoted_by[:, b], np.take_along_axis(rise, best, -1), **EXACT)


def test_lens_of_the_planted_adder() -> None:
    """The answer is nowhere before MLP 3; that MLP puts it first and promotes it most."""
    problems = [(a, b) for a in range(5) for b in range(5)]
    answers = np.array([planted.SUM0 + a + b for a, b in problems])
    with true_fp64():
        result = logit_lens(
            planted.adder(), torch.tensor([planted.problem(*p) for p in problems]), answers=answers, k=planted.VOCAB
        )
    uniform = 1 / planted.VOCAB
    sure = np.exp(planted.LOGIT) / (np.exp(planted.LOGIT) + planted.VOCAB - 1)
    flat = result.answer_probabilities.reshape(8, 25)
    np.testing.assert_allclose(flat[:7], uniform, rtol=1e-12)
    np.testing.assert_allclose(flat[7], sure, rtol=1e-10)
    assert (result.answer_ranks == 0).all()  # no token is above it, not even where all are equal
    np.testing.assert_array_equal(result.tokens[3, 1, :, 0], answers)
    np.testing.assert_array_equal(result.promoted[3, :, 0], answers)
    np.testing.assert_allclose(result.promoted_by[3, :, 0], planted.LOGIT, rtol=1e-10)
    np.testing.assert_allclose(result.probabilities.sum(-1), 1, rtol=1e-12)


def test_lens_without_answers_and_its_tables() -> None:
    model, tokenizer = pa.load_demo()
    pairs = pa.tasks.arithmetic(tokenizer, n=12)
    result = logit_lens(model, pairs, k=3)
    assert result.tokens.shape == (model.config.num_hidden_layers, 2, 12, 3)
    choices = model(torch.tensor(pairs.clean[:1, : pairs.lengths[0]])).logits[0, -1].argmax()
    assert result.tokens[-1, 1, 0, 0] == int(choices)
    assert repr(tokenizer.decode([int(choices)])) in result.table(0, tokenizer).splitlines()[-2]
    row = next(iter(result.rows(tokenizer)))
    assert row["stage"] == "before" and row["text"] == tokenizer.decode([row["token"]])
    assert len(list(result.rows())) == result.tokens.size and "median rank" in repr(result)
    bare = logit_lens(model, pairs.clean, attention_mask=pairs.attention_mask, k=3)
    assert bare.answer_ranks is None and bare.answer_probabilities is None and repr(bare)
    np.testing.assert_array_equal(bare.tokens, result.tokens)
    with pytest.raises(PyarithError, match="prompt: expected 0 to 11, got 12"):
        result.table(12)
