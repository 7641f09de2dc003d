"""Runs every C++ kernel with each tensor flush against an unreadable page, and checks the numbers against fp64.

A read or write one byte outside a tensor ends the process with a segmentation fault; the last line printed names the
case. Run by test_registry.py once for each instruction set (PYARITH_CPU), with tests/ on PYTHONPATH.
"""

from __future__ import annotations

import ctypes
import mmap
from itertools import product

import torch
from adamw_cases import problem
from cases import (
    NATIVE,
    eager_add_norm,
    eager_gated_act,
    make,
    oracle_add_norm,
    oracle_gated_act,
    plain_answer_logits,
)
from tolerances import assert_within_rule, error

from pyarith import ops

PAGE = mmap.PAGESIZE
SIZES = (1, 3, 15, 16, 17, 31, 33, 65, 127)
libc = ctypes.CDLL(None, use_errno=True)
regions = []  # alive as long as the tensors in them


def guarded(tensor: torch.Tensor, side: str) -> torch.Tensor:
    """A copy of ``tensor`` whose last byte ("end") or first byte ("start") borders on a page without access."""
    size = tensor.numel() * tensor.itemsize
    inner = max(1, -(-size // PAGE)) * PAGE
    region = mmap.mmap(-1, inner + 2 * PAGE)
    regions.append(region)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for page in (address, address + PAGE + inner):
        assert libc.mprotect(ctypes.c_void_p(page), PAGE, 0) == 0, ctypes.get_errno()
    offset = PAGE + (inner - size if side == "end" else 0)
    return (
        torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        .view(tensor.shape)
        .copy_(tensor)
    )


def check_add_norm(d, dtype, kind, place):
    row, delta, write = make(2, 3, d), make(2, 3, d, dtype=dtype, seed=1), make(3, d, seed=2)
    weight, bias = make(d, dtype=dtype, seed=3), make(d, dtype=dtype, seed=4) if kind == "layer" else None
    plain = (row, delta, write, weight, bias, 1e-5, kind)
    oracle_row, oracle = oracle_add_norm(*plain)
    eager = eager_add_norm(*plain, dtype)
    placed = [None if t is None else place(t) for t in plain[:5]]
    out = ops.add_norm(*placed, 1e-5, kind, out=place(torch.empty(2, 3, d, dtype=dtype)), backend="cpu")
    assert_within_rule(out, eager, oracle, "out")
    assert_within_rule(placed[0], row + delta + write, oracle_row, "row")


def check_gated_act(d, dtype, act, place):
    gate, up = make(3, d, dtype=dtype) * 3, make(3, d, dtype=dtype, seed=1)
    for other in (up, None):
        out = place(torch.empty(3, d, dtype=dtype))
        ops.gated_act(place(gate), None if other is None else place(up), act, out=out, backend="cpu")
        assert_within_rule(out, eager_gated_act(gate, other, act), oracle_gated_act(gate, other, act), "out")
    # the second half of a fused projection ends where its tensor ends; the first half begins where it begins
    fused = place(torch.cat([gate, up], -1))
    first, second = fused.chunk(2, -1)
    ops.gated_act(first, second, act, out=first, backend="cpu")
    assert_within_rule(first, eager_gated_act(gate, up, act), oracle_gated_act(gate, up, act), "in place")
    assert torch.equal(second, up)


def check_answer_logits(d, dtype, kind, place):
    row, write, weight, targets = make(2, 3, d), make(3, d), make(d, dtype=dtype), make(3, 2, d, dtype=dtype)
    bias, target_bias = make(d, dtype=dtype) if kind == "layer" else None, make(3, 2)
    plain = (row, write, weight, bias, 1e-5, kind, targets, target_bias, 0.5, 20.0)
    placed = [place(t) if isinstance(t, torch.Tensor) else t for t in plain[:8]]
    out = ops.answer_logits(*placed, scale=0.5, softcap=20.0, out=place(torch.empty(2, 3, 2)), backend="cpu")
    assert_within_rule(
        out, plain_answer_logits(torch.float32, *plain), plain_answer_logits(torch.float64, *plain), "out"
    )


def check_masked_adamw(d, dtype, word, place):
    """The bits of the reference, which are those of every instruction set."""
    shape, dim = dict(rows=((d + 2, 3), 0), columns=((3, d + 2), 1), bias=((d + 2,), 0))[word]
    cases = [(shape, dim, ((0, 1), (2, d + 2)))]
    if word == "columns" and d == SIZES[-1]:  # written past the caches
        cases = [((900, 301), 1, ((0, 150), (151, 301)))]
    for seed in (None, 3) if dtype is torch.bfloat16 else (None,):
        given = problem(dtype, cases, seed=seed, grad_scale=torch.tensor([0.3]))
        placed = given.copy(place)
        given.step(2, "reference")
        placed.step(2, "cpu")
        for got, expected in zip(placed.changed(), given.changed(), strict=True):
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), (seed, error(got, expected))


def main() -> None:
    checks = (
        (check_add_norm, ops.KINDS),
        (check_gated_act, ops.ACTS),
        (check_answer_logits, ops.KINDS),
        (check_masked_adamw, ("rows", "columns", "bias")),
    )
    for check, words in checks:
        for d, dtype, word, side in product(SIZES, NATIVE, words, ("start", "end")):
            print(check.__name__, d, dtype, word, side, flush=True)
            check(d, dtype, word, lambda tensor, side=side: guarded(tensor, side))
    print("done at", ops.native_info()["cpu_level"])


if __name__ == "__main__":
    main()
