"""`gated_act` at replay sizes: silu(gate) * up into a buffer that exists."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from op_bench import OpCase, main

ROWS_AND_WIDTHS = ((512, 2048), (512, 1376), (512, 11008))


def build(rows: int, d_mlp: int, dtype: torch.dtype) -> OpCase:
    from pyarith import ops

    torch.manual_seed(0)
    gate, up = torch.randn(rows, d_mlp).to(dtype), torch.randn(rows, d_mlp).to(dtype)
    out = torch.empty_like(gate)
    return OpCase(
        shape={"rows": rows, "d_mlp": d_mlp},
        dtype=dtype,
        eager=lambda: F.silu(gate).mul_(up),
        run=lambda backend: ops.gated_act(gate, up, "silu", out=out, backend=backend),
        oracle=F.silu(gate.double()) * up.double(),
        bytes=3 * gate.numel() * dtype.itemsize,
    )


def cases(quick: bool) -> Iterator[OpCase]:
    for rows, d_mlp in ((8, 176),) if quick else ROWS_AND_WIDTHS:
        for dtype in (torch.float32, torch.bfloat16):
            yield build(rows, d_mlp, dtype)


if __name__ == "__main__":
    main("gated_act", cases, __doc__)
