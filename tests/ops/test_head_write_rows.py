"""head_write_rows: by hand, every backend against fp64, views of linear and Conv1D weights, refusals."""

import pytest
import torch
from cases import make, name_of
from tolerances import assert_within_rule

from pyarith import ops
from pyarith.errors import InputError


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_by_hand(backend):
    # two heads of size 1: head 0 writes along (1, 0), head 1 along (0, 2); dz = (3, 5)
    base, dz = torch.tensor([[10.0, 20.0]]), torch.tensor([[[3.0], [5.0]]])
    w_o = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    assert ops.head_write_rows(base, dz, w_o, backend=backend).tolist() == [[[13.0, 20.0]], [[10.0, 30.0]]]
    assert ops.head_write_rows(None, dz, w_o, backend=backend).tolist() == [[[3.0, 0.0]], [[0.0, 10.0]]]


def weights(layout, head, d_head, d_model, dtype):
    """w_o as a view of what the two kinds of module store."""
    if layout == "linear":  # [d_model, head * d_head]
        return make(d_model, head * d_head, dtype=dtype).T.view(head, d_head, d_model)
    return make(head * d_head, d_model, dtype=dtype).view(head, d_head, d_model)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("layout", ("linear", "conv1d"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=name_of)
@pytest.mark.parametrize("batch, head, d_head, d_model", ((1, 1, 1, 1), (3, 5, 7, 17), (2, 3, 64, 127)))
def test_against_fp64(backend, layout, dtype, batch, head, d_head, d_model):
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    w_o = weights(layout, head, d_head, d_model, dtype)
    dz, base = make(batch, head, d_head, dtype=wide), make(batch, d_model, dtype=wide)
    oracle = base.double() + (dz.double().transpose(0, 1) @ w_o.double())
    eager = base + dz.transpose(0, 1) @ w_o.to(wide)
    out = torch.full((head, batch, d_model), torch.nan, dtype=wide)
    assert ops.head_write_rows(base, dz, w_o, out=out, backend=backend) is out
    assert_within_rule(out, eager, oracle)
    strided = make(head, batch, d_head, dtype=wide).transpose(0, 1)
    assert_within_rule(
        ops.head_write_rows(None, strided, w_o, backend=backend),
        strided.transpose(0, 1) @ w_o.to(wide),
        strided.double().transpose(0, 1) @ w_o.double(),
    )


@pytest.mark.parametrize("shape", ((0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 4, 0)), ids=str)
@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_empty(shape, backend):
    batch, head, d_head, d_model = shape
    out = ops.head_write_rows(
        torch.ones(batch, d_model), torch.ones(batch, head, d_head), torch.ones(head, d_head, d_model), backend=backend
    )
    assert out.shape == (head, batch, d_model)


@pytest.mark.parametrize(
    "changed, words",
    (
        (dict(dz=make(2, 12)), "dz: expected [batch, head, d_head], got shape (2, 12)"),
        (dict(w_o=make(3, 5, 17)), "w_o: expected shape [head, d_head, d_model] = (3, 4, 17), got (3, 5, 17)"),
        (dict(base=make(3, 17)), "base: expected shape [batch, d_model] = (2, 17), got (3, 17)"),
        (dict(out=torch.empty(3, 2, 17, dtype=torch.bfloat16)), "out: expected dtype float32, float64; got bfloat16"),
        (dict(out=torch.empty(2, 3, 17).transpose(0, 1)), "out: expected a contiguous tensor"),
        (dict(w_o=make(3, 4, 17).requires_grad_()), "head_write_rows has no gradient"),
    ),
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_refusals_name_the_argument(changed, words):
    with pytest.raises(InputError) as caught:
        ops.head_write_rows(**(dict(base=make(2, 17), dz=make(2, 3, 4), w_o=make(3, 4, 17)) | changed))
    assert words in str(caught.value)
