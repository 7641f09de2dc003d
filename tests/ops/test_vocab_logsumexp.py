"""vocab_logsumexp: against fp64 for every chunk size, extremes, refusals."""

import math
import sys

import pytest
import torch
from cases import make, name_of
from tolerances import assert_within_rule, error

from pyarith import ops
from pyarith.errors import InputError


def plain_logsumexp(dtype, normed, unembed, bias, scale, softcap):
    logits = scale * (normed.to(dtype) @ unembed.to(dtype).T)
    logits = logits if bias is None else logits + bias.to(dtype)
    return (softcap * torch.tanh(logits / softcap) if softcap else logits).logsumexp(-1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=name_of)
@pytest.mark.parametrize("chunk", (1, 7, 100, 101, 8192))
def test_vocab_logsumexp(dtype, chunk, monkeypatch):
    # by name of the module: the package's attribute of that name is the function
    monkeypatch.setattr(sys.modules["pyarith.ops.vocab_logsumexp"], "chunk_tokens", lambda rows, d_model: chunk)
    normed, unembed, bias = make(5, 17, dtype=dtype), make(101, 17, dtype=dtype), make(101)
    out = ops.vocab_logsumexp(normed, unembed, bias, scale=0.5, softcap=20.0)
    oracle = plain_logsumexp(torch.float64, normed, unembed, bias, 0.5, 20.0)
    assert out.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert_within_rule(out, plain_logsumexp(out.dtype, normed, unembed, bias, 0.5, 20.0), oracle)


def test_large_logits_and_no_rows():
    normed = torch.full((2, 1), 1000.0)
    assert error(ops.vocab_logsumexp(normed, torch.ones(4, 1)), torch.full((2,), 1000 + math.log(4))) < 1e-6
    assert ops.vocab_logsumexp(torch.empty(0, 3), torch.ones(4, 3)).shape == (0,)


@pytest.mark.parametrize(
    "changed, words",
    (
        (dict(unembed=make(4, 2)), "unembed: expected shape [d_vocab, d_model] = (4, 1), got (4, 2)"),
        (dict(bias=make(3)), "bias: expected shape [d_vocab] = (4,), got (3,)"),
        (dict(softcap=-1.0), "softcap: expected 0 (none) or a positive number, got -1.0"),
        (dict(out=torch.empty(3)), "out: expected shape [rows] = (2,), got (3,)"),
        (dict(normed=make(2, 1).requires_grad_()), "vocab_logsumexp has no gradient"),
    ),
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_refusals_name_the_argument(changed, words):
    known = dict(normed=make(2, 1), unembed=make(4, 1))
    with pytest.raises(InputError) as caught:
        ops.vocab_logsumexp(**(known | changed))
    assert words in str(caught.value)
