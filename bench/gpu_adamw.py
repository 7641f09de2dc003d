"""The problem of `masked_adamw`: rows of W_Q, W_K and W_V, a bias, and columns of W_O of the same heads, by layer."""

from collections.abc import Iterator, Sequence

import torch
from gpu_problems import Arguments, Draw, Problem, Ranges, Tensor
from torch.optim.adamw import adamw

from pyarith import ops

STEP = 5
NUMBERS = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
KINDS = ("param", "grad", "exp_avg", "exp_avg_sq", "weight")


def masked_adamw(
    draw: Draw, dtype: torch.dtype, d_model: int, ranges: Ranges, layers: int = 1, seed: int | None = None
) -> Problem:
    """`seed`: of stochastic rounding into bf16 weights. Rival: torch's fused AdamW, which writes no weights."""
    seed = seed if dtype is torch.bfloat16 else None
    taken = sum(stop - start for start, stop in ranges)
    dims = [0, 0, 0, 0, 1] * layers
    shapes = [(d_model,), *[(d_model, d_model)] * 4] * layers
    arguments: Arguments = {"grad_scale": draw(1).abs_()}
    for i, (shape, dim) in enumerate(zip(shapes, dims, strict=True)):
        slice_shape = tuple(taken if axis == dim else size for axis, size in enumerate(shape))
        arguments |= {f"{kind}{i}": draw(*slice_shape) for kind in KINDS[:3]}
        arguments[f"exp_avg_sq{i}"] = draw(*slice_shape).square_()
        arguments[f"weight{i}"] = draw(*shape, dtype=dtype)
    count = range(len(dims))

    def of_kind(t: Arguments, kind: str) -> list[Tensor]:
        return [t[f"{kind}{i}"] for i in count]

    def run(t: Arguments, backend: str) -> None:
        lists = [of_kind(t, kind) for kind in KINDS]
        numbers = dict(NUMBERS, step=STEP, grad_scale=t["grad_scale"], seed=seed)
        ops.masked_adamw(*lists, [ranges] * len(dims), dims, **numbers, backend=backend)

    def plain(t: Arguments, like: torch.dtype) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Number, new values and moments of each slice."""
        n = NUMBERS
        for i in count:
            p, g, m, v = (t[f"{kind}{i}"].to(like) for kind in KINDS[:4])
            g = g * t["grad_scale"].to(like)
            m = m.lerp(g, 1 - n["beta1"])
            v = n["beta2"] * v + (1 - n["beta2"]) * g * g
            root = (v / (1 - n["beta2"] ** STEP)).sqrt()
            p = p * (1 - n["lr"] * n["weight_decay"]) - n["lr"] / (1 - n["beta1"] ** STEP) * m / (root + n["eps"])
            yield i, (p, m, v)

    def put(weight: Tensor, dim: int, value: Tensor) -> Tensor:
        at = 0
        for start, stop in ranges:
            weight.narrow(dim, start, stop - start).copy_(value.narrow(dim, at, stop - start))
            at += stop - start
        return weight

    def eager(t: Arguments) -> None:
        for i, values in plain(t, torch.float32):
            for kind, value in zip(("param", "exp_avg", "exp_avg_sq"), values, strict=True):
                t[f"{kind}{i}"].copy_(value)
            put(t[f"weight{i}"], dims[i], values[0])

    def oracle(t: Arguments) -> tuple[Tensor, ...]:
        found = [(*values, put(t[f"weight{i}"].double(), dims[i], values[0])) for i, values in plain(t, torch.float64)]
        return tuple(value for values in found for value in values)

    def fused(t: Arguments) -> None:
        p, g, m, v = (of_kind(t, kind) for kind in KINDS[:4])
        steps = [torch.full((), float(STEP - 1), device=draw.device) for _ in count]
        options = dict(NUMBERS, amsgrad=False, maximize=False, grad_scale=1 / t["grad_scale"])
        adamw(p, g, m, v, [], steps, fused=True, **options)

    changed = [f"{kind}{i}" for i in count for kind in ("param", "exp_avg", "exp_avg_sq", "weight")]
    elements = sum(tensor.numel() for tensor in of_kind(arguments, "param"))
    return Problem(
        {"d_model": d_model, "ranges": len(ranges), "rows": taken, "layers": layers, "stochastic": seed is not None},
        arguments,
        run,
        eager,
        oracle,
        results=tuple(changed),
        outs=(),
        moved=elements * (28 + dtype.itemsize),  # of the weights only the slices are written, and nothing is read
        rivals={"torch fused, slices only": (fused, None)},
    )
