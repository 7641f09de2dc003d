"""What cosines, lens and attribution have in common: dtypes, models and arguments that are refused."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from plain_runs import ANSWERS, OPERANDS, given
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from tiny_models import make

from pyarith.analysis import logit_attribution, logit_lens, mlp_cosines
from pyarith.errors import NonFiniteError, NotAvailableError, PyarithError, UnsupportedModelError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama-gqa2", "gemma2", "gpt2", "neox"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    near = 1e-4 if dtype is torch.float32 else 0.2
    model, exact = make(name, dtype), make(name)
    for function, options, fields in (
        (mlp_cosines, {"operands": OPERANDS}, ("operand_a", "operand_b", "answer")),
        (logit_lens, {}, ("answer_probabilities",)),
        (logit_attribution, {}, ("heads", "mlps")),
    ):
        with unchanged(model):
            result = function(model, **options, **given("left"))
        expected = function(exact, **options, **given("left"))
        for field in fields:
            assert getattr(result, field).dtype == np.float32
            scale = max(1.0, np.abs(getattr(expected, field)).max())
            np.testing.assert_allclose(getattr(result, field), getattr(expected, field), rtol=0, atol=near * scale)


FUNCTIONS: dict[str, Any] = {
    "cosines": lambda model, **options: mlp_cosines(model, operands=OPERANDS, **options),
    "lens": logit_lens,
    "attribution": logit_attribution,
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_refused_models(function: str) -> None:
    call = FUNCTIONS[function]
    with pytest.raises(NonFiniteError, match=r"END of prompts"):
        model = make("llama")
        model.model.layers[1].mlp.down_proj.weight.data[0] = float("nan")
        call(model, **given("left"))
    model = make("llama")
    model.compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match="compiled"):
        call(model, **given("left"))
    model = make("gpt2")
    model.transformer.h[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        call(model, **given("left"))
    with pytest.raises(PyarithError, match="model: expected a Hugging Face"):
        call(torch.nn.Linear(2, 2), **given("left"))


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "k-large": ("lens", {"k": 98}, "k: expected 1 to 97, the size of the vocabulary, got 98"),
    "k-zero": ("lens", {"k": 0}, "k: expected 1 to 97"),
    "k-float": ("lens", {"k": 2.0}, "k: expected 1 to 97"),
    "answers-length": ("lens", {"answers": ANSWERS[:2]}, "answers: expected batch 4 like prompts, got 2"),
    "answers-outside": ("lens", {"answers": ANSWERS + 50}, r"answers: expected token ids in \[0, 97\)"),
    "answers-missing": ("attribution", {"answers": None}, r"answers: expected int64 \[batch\], got None"),
    "cosines-answers": ("cosines", {"answers": None}, r"answers: expected int64 \[batch\], got None"),
    "mask-hole": ("lens", {"attention_mask": torch.tensor([[1, 0, 1] + [1] * 7] * 4)}, "have a hole"),
    "tokens": ("attribution", {"tokens_per_pass": "many"}, "tokens_per_pass: expected a positive"),
    "tokens-bool": ("attribution", {"tokens_per_pass": True}, "tokens_per_pass: expected a positive"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    function, changes, message = BAD[case]
    with pytest.raises(PyarithError, match=message):
        FUNCTIONS[function](make("llama"), **{**given("left"), **changes})


def test_too_long_for_learned_positions() -> None:
    with pytest.raises(PyarithError, match="at most 64 tokens with learned positions"):
        logit_lens(make("gpt2"), torch.ones(1, 65, dtype=torch.int64))


def test_dropout_stays_out() -> None:
    model = make("gpt2", torch.float32, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    still = logit_lens(model, **given("left"))
    model.train()
    with unchanged(model):
        trained = logit_lens(model, **given("left"))
    np.testing.assert_array_equal(still.probabilities, trained.probabilities)


def test_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """``to_dataframe`` hands its rows to pandas, or says that it is missing; pandas itself is not needed here."""
    results = [call(make("llama"), **given("left")) for call in FUNCTIONS.values()]
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))
    for result in results:
        table = result.to_dataframe()
        assert table == list(result.rows()) and len({tuple(row) for row in table}) == 1
    monkeypatch.setitem(sys.modules, "pandas", None)
    for result in results:
        with pytest.raises(NotAvailableError, match="pip install pandas"):
            result.to_dataframe()
