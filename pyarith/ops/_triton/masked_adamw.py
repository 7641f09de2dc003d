"""AdamW on one compact slice, each new value rounded into its place in the full weight; formula in `ops.masked_adamw`

Ownership: one program = BLOCK elements of a slice that follow each other, in groups of 8, with their places in the
weight. One launch takes a slice [rows, width] with up to 8 runs of columns; more runs take more launches.
Traffic: 28 bytes an element (param and two moments read and written, grad read) + the weight's size, written.
Accumulation: none; fp32, each operation rounded by itself (so no contraction), as on every other backend.
Repeatable bitwise; the random bits are those of `ops._random.noise`.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the parameters of a kernel have no Python types)

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from pyarith.ops._contract import split_bounds
from pyarith.ops._triton._launch import Launch, blocks

RUNS = 8  # of one launch
BLOCK = 512
_NOWHERE = 2**62  # where a run begins that does not exist
_INTEGERS = [
    *("count", "width", "param_row", "weight_row", "first_element", "seed", "step", "number"),
    *(f"begin_{i}" for i in range(1, RUNS)),
    *(f"shift_{i}" for i in range(RUNS)),
]


@triton.jit
def _stored_bf16(value, noise, STOCHASTIC: tl.constexpr):
    """fp32 rounded to bf16, by integers: to nearest, or away from zero where what is cut off and `noise` overflow."""
    bits = value.to(tl.uint32, bitcast=True)
    if STOCHASTIC:
        moved = bits + noise
    else:
        moved = bits + 0x7FFF + ((bits >> 16) & 1)
    moved = tl.where(value != value, bits | 0x400000, moved)
    return (moved >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=_INTEGERS)
def _masked_adamw(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    weight,
    grad_scale,
    count,
    width,
    param_row,
    weight_row,
    first_element,
    begin_1,
    begin_2,
    begin_3,
    begin_4,
    begin_5,
    begin_6,
    begin_7,
    shift_0,
    shift_1,
    shift_2,
    shift_3,
    shift_4,
    shift_5,
    shift_6,
    shift_7,
    shrink,
    blend,
    keep,
    second,
    unbias,
    rate,
    eps,
    seed,
    step,
    number,
    FROM_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    member = tl.arange(0, 8)[None, :].to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK // 8)[:, None].to(tl.int64) * 8
    if GROUPED:  # 8 elements lie together everywhere: one address for all of them
        more = member
    else:
        i += member
        more = member * 0
    row = i // width
    column = i - row * width
    place = tl.where(column >= begin_1, shift_1.to(tl.int64), shift_0.to(tl.int64))
    place = tl.where(column >= begin_2, shift_2.to(tl.int64), place)
    place = tl.where(column >= begin_3, shift_3.to(tl.int64), place)
    place = tl.where(column >= begin_4, shift_4.to(tl.int64), place)
    place = tl.where(column >= begin_5, shift_5.to(tl.int64), place)
    place = tl.where(column >= begin_6, shift_6.to(tl.int64), place)
    place = tl.where(column >= begin_7, shift_7.to(tl.int64), place)
    at = row * param_row.to(tl.int64) + column
    place += row * weight_row.to(tl.int64) + column
    if GROUPED:
        at = tl.multiple_of(at, [8, 8])
        place = tl.multiple_of(place, [8, 8])
    here = (i < count) & (more >= 0)
    at_all = at + more
    g = tl.load(grad + at_all, mask=here, other=0.0)
    p = tl.load(param + at_all, mask=here, other=0.0)
    m = tl.load(exp_avg + at_all, mask=here, other=0.0)
    v = tl.load(exp_avg_sq + at_all, mask=here, other=0.0)
    if grad_scale is not None:
        g = g * tl.load(grad_scale)
    if FROM_GRAD:
        m = g + blend * (m - g)
    else:
        m = m + blend * (g - m)
    v = keep * v + second * (g * g)
    change = rate * tl.div_rn(m, tl.sqrt_rn(v) * unbias + eps)
    p = p - (change + shrink * p)
    tl.store(exp_avg + at_all, m, mask=here)
    tl.store(exp_avg_sq + at_all, v, mask=here)
    tl.store(param + at_all, p, mask=here)
    if weight.dtype.element_ty == tl.bfloat16:
        half = tl.zeros_like(p).to(tl.uint32)
        if STOCHASTIC:
            element = first_element.to(tl.int64) + at
            group = element // 8
            low = (group & 0xFFFFFFFF).to(tl.uint32)
            high = (group >> 32).to(tl.uint32)
            zero = low ^ low
            a, b, c, d = tl.philox(seed, low, high, zero + step.to(tl.uint32), zero + number.to(tl.uint32))
            part = (element % 8 + more).to(tl.int32)
            word = tl.where(part < 2, a, tl.where(part < 4, b, tl.where(part < 6, c, d)))
            half = (word >> ((part % 2) * 16).to(tl.uint32)) & 0xFFFF
        tl.store(weight + (place + more), _stored_bf16(p, half, STOCHASTIC), mask=here)
    else:
        tl.store(weight + (place + more), p.to(weight.dtype.element_ty), mask=here)


def _runs(bounds: Sequence[int], unit: int) -> list[tuple[int, int, int]]:
    """(begin and end in a row of the slice, begin in a row of the weight) of each range, ``unit`` elements a step."""
    found, at = [], 0
    for start, stop in zip(bounds[::2], bounds[1::2], strict=True):
        found.append((at * unit, (at + stop - start) * unit, start * unit))
        at += stop - start
    return found


def plan(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    bounds: Sequence[int],
    counts: Sequence[int],
    dims: Sequence[int],
    grad_scale: torch.Tensor | None,
    *,
    step: int,
    seed: int | None,
    from_grad: bool,
    **factors: float,
) -> Iterator[Launch]:
    """The launches, one for up to 8 runs of a slice; depend on shapes, ranges and dtypes only."""
    for number, (param, weight, dim, own) in enumerate(
        zip(params, weights, dims, split_bounds(bounds, counts), strict=True)
    ):
        # whole rows follow each other without a gap: all of them are one
        rows, unit = (param.shape[0], 1) if dim else (1, param[:1].numel())
        param_row, weight_row = param.shape[dim] * unit, weight.shape[dim] * unit
        runs = _runs(own, unit)
        for chosen in (runs[i : i + RUNS] for i in range(0, len(runs), RUNS)):
            first, last = chosen[0][0], chosen[-1][1]
            parts = dict(param=param, grad=grads[number], exp_avg=exp_avgs[number], exp_avg_sq=exp_avg_sqs[number])
            begins = [run[0] - first for run in chosen[1:]] + [_NOWHERE] * (RUNS - len(chosen))
            shifts = [run[2] - (run[0] - first) for run in chosen] + [0] * (RUNS - len(chosen))
            distances = [bound for run in chosen for bound in run] + [param_row, weight_row] * (rows > 1)
            yield Launch(
                _masked_adamw,
                programs=blocks(rows * (last - first), BLOCK),
                arguments=dict(
                    **{name: tensor.reshape(-1)[first:] for name, tensor in parts.items()},
                    weight=weight,
                    grad_scale=grad_scale,
                    count=rows * (last - first),
                    width=last - first,
                    param_row=param_row,
                    weight_row=weight_row,
                    first_element=first,
                    **{f"begin_{i}": begin for i, begin in enumerate(begins, 1)},
                    **{f"shift_{i}": shift for i, shift in enumerate(shifts)},
                    **factors,
                    seed=seed or 0,
                    step=step,
                    number=number,
                    FROM_GRAD=from_grad,
                    BLOCK=BLOCK,
                    GROUPED=all(distance % 8 == 0 for distance in distances),
                    STOCHASTIC=seed is not None,
                ),
                num_warps=4,
                num_stages=1,
                contracted=False,
            )


def launch(*listed: Any, **named: Any) -> None:
    """One step; arguments as of ``plan``."""
    for one in plan(*listed, **named):
        one.start(listed[0][0])
