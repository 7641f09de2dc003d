"""`answer_logits` at replay sizes: final RMSNorm and one unembedding row per prompt."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from op_bench import OpCase, main, row_shapes

EPS = 1e-6


def build(variant: int, batch: int, d_model: int, dtype: torch.dtype) -> OpCase:
    from pyarith import ops

    torch.manual_seed(0)
    row = torch.randn(variant, batch, d_model)
    write, weight = torch.randn(batch, d_model).to(dtype), torch.rand(d_model).add(0.5).to(dtype)
    targets = torch.randn(batch, 1, d_model).to(dtype)
    out = torch.empty(variant, batch, 1)

    def plain(row: torch.Tensor) -> torch.Tensor:
        like = row.dtype
        hidden = F.rms_norm(row + write.to(like), (d_model,), weight.to(like), EPS)
        return (hidden * targets[:, 0].to(like)).sum(-1, keepdim=True)

    return OpCase(
        shape={"variant": variant, "batch": batch, "d_model": d_model},
        dtype=dtype,
        eager=lambda: plain(row),
        run=lambda backend: ops.answer_logits(row, write, weight, None, EPS, "rms", targets, out=out, backend=backend),
        oracle=plain(row.double()),
        bytes=row.numel() * 4,
    )


def cases(quick: bool) -> Iterator[OpCase]:
    for shape in row_shapes(quick):
        for dtype in (torch.float32, torch.bfloat16):
            yield build(*shape, dtype)


if __name__ == "__main__":
    main("answer_logits", cases, __doc__)
