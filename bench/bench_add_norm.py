"""`add_norm` at replay sizes: row += delta + write, then RMSNorm; fp32 rows, the rest in the model's dtype."""

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from op_bench import OpCase, main, row_shapes

EPS = 1e-6


def build(variant: int, batch: int, d_model: int, dtype: torch.dtype) -> OpCase:
    from pyarith import ops

    torch.manual_seed(0)
    row = torch.randn(variant, batch, d_model)
    delta, write = torch.randn(variant, batch, d_model).to(dtype), torch.randn(batch, d_model).to(dtype)
    weight = torch.rand(d_model).add(0.5).to(dtype)
    exact = row.double() + delta.double() + write.double()
    out = torch.empty(row.shape, dtype=dtype)
    eager_row, op_rows = row.clone(), defaultdict(row.clone)  # updated in place: one copy per provider

    def eager() -> torch.Tensor:
        eager_row.add_(delta).add_(write)
        return F.rms_norm(eager_row, (d_model,), weight.float(), EPS).to(dtype)

    def run(backend: str) -> torch.Tensor:
        return ops.add_norm(op_rows[backend], delta, write, weight, None, EPS, "rms", out=out, backend=backend)

    return OpCase(
        shape={"variant": variant, "batch": batch, "d_model": d_model},
        dtype=dtype,
        eager=eager,
        run=run,
        oracle=F.rms_norm(exact, (d_model,), weight.double(), EPS),
        bytes=row.numel() * (2 * 4 + 2 * dtype.itemsize),
    )


def cases(quick: bool) -> Iterator[OpCase]:
    for shape in row_shapes(quick):
        for dtype in (torch.float32, torch.bfloat16):
            yield build(*shape, dtype)


if __name__ == "__main__":
    main("add_norm", cases, __doc__)
