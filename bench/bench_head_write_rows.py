"""`head_write_rows`: all heads of a layer, W_O read as a view of the model's weight; eager PyTorch is one baddbmm."""

from collections.abc import Iterator

import torch
from op_bench import OpCase, main

SHAPES = ((8, 12, 64), (4, 8, 64), (64, 12, 64), (8, 32, 128))  # (batch, head, d_head), d_model = head * d_head


def build(batch: int, head: int, d_head: int, dtype: torch.dtype) -> OpCase:
    from pyarith import ops

    torch.manual_seed(0)
    d_model = head * d_head
    base, dz = torch.randn(batch, d_model), torch.randn(batch, head, d_head).to(dtype)
    weight = torch.randn(d_model, d_model).to(dtype) / d_model**0.5
    w_o = weight.T.view(head, d_head, d_model)
    out = torch.empty(head, batch, d_model)

    def plain(like: torch.dtype) -> torch.Tensor:
        start = base.to(like).expand(head, batch, d_model)
        return torch.baddbmm(start, dz.to(like).transpose(0, 1), w_o.to(like))

    return OpCase(
        shape={"batch": batch, "head": head, "d_head": d_head, "d_model": d_model},
        dtype=dtype,
        eager=lambda: plain(torch.float32),
        run=lambda backend: ops.head_write_rows(base, dz, w_o, out=out, backend=backend),
        oracle=plain(torch.float64),
        bytes=weight.numel() * dtype.itemsize + out.numel() * 4,
        gemm_flop=2 * batch * d_model * d_model,
    )


def cases(quick: bool) -> Iterator[OpCase]:
    for shape in ((2, 4, 16),) if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            yield build(*shape, dtype)


if __name__ == "__main__":
    main("head_write_rows", cases, __doc__)
