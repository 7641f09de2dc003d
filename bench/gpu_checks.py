"""Stage "kernels": every op with every backend of this device, from fresh random inputs, against fp64.

A kernel's error may be twice that of plain PyTorch plus the floor of its dtype (tests/tolerances.py). Outputs are NaN
before each run. Two runs, a run on another stream and one replayed from a captured graph give the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from gpu_adamw import masked_adamw
from gpu_problems import (
    Draw,
    Problem,
    ablate_heads,
    add_norm,
    answer_logits,
    fill,
    gated_act,
    head_write_rows,
    shared_prefix_attention,
    slice_grad,
    vocab_logsumexp,
)
from gpu_work import Bench, Case
from harness import Check, Row
from tolerances import FLOOR, error

from pyarith import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Build = Callable[[Draw, torch.dtype], Problem]


def problems(op: str, tiny: bool) -> Iterator[Build]:
    """Odd and small shapes with all options, and a replay-sized one; `tiny` narrows the last."""
    wide = 256 if tiny else 4096
    if op == "add_norm":
        for kind in ops.KINDS:
            for shape in ((3, 5, 1), (3, 5, 17), (2, 3, 768), (7, 15, wide), (2, 2, 5 * wide)):
                yield partial(add_norm, variant=shape[0], batch=shape[1], d_model=shape[2], kind=kind)
            yield partial(add_norm, variant=2, batch=3, d_model=127, kind=kind, addends=False)
    elif op == "gated_act":
        for act in ops.ACTS:
            yield partial(gated_act, rows=5, d_mlp=17, act=act)
            yield partial(gated_act, rows=3, d_mlp=127, act=act, gated=False)
            yield partial(gated_act, rows=64, d_mlp=11 * wide // 4, act=act, in_place=True)
            yield partial(gated_act, rows=7, d_mlp=wide, act=act, halves=True)
    elif op == "answer_logits":
        for kind in ops.KINDS:
            yield partial(answer_logits, variant=3, batch=5, k=4, d_model=17, kind=kind, scale=0.5, softcap=3.0)
            yield partial(answer_logits, variant=2, batch=3, k=1, d_model=127, kind=kind, extras=False)
            yield partial(answer_logits, variant=7, batch=15, k=2, d_model=wide, kind=kind)
    elif op == "head_write_rows":
        # without base: where it nearly cancels a single product, an error relative to the result says nothing
        yield partial(head_write_rows, batch=1, head=1, d_head=1, d_model=1, base=False)
        yield partial(head_write_rows, batch=3, head=5, d_head=7, d_model=17, linear=False)
        yield partial(head_write_rows, batch=15, head=4, d_head=80, d_model=wide, base=False)
        yield partial(head_write_rows, batch=50, head=wide // 128, d_head=128, d_model=wide)
    elif op == "vocab_logsumexp":
        yield partial(vocab_logsumexp, rows=1, d_model=1, d_vocab=1)
        yield partial(vocab_logsumexp, rows=5, d_model=17, d_vocab=101, bias=True, softcap=3.0)
        yield partial(vocab_logsumexp, rows=130, d_model=wide, d_vocab=8 * wide - 1)
    elif op == "ablate_heads":
        yield partial(ablate_heads, variant=3, batch=2, pos=5, head=3, d_head=17)
        yield partial(ablate_heads, variant=3, batch=2, pos=5, head=3, d_head=17, baseline=(1, 1), same_z=True)
        yield partial(ablate_heads, variant=3, batch=2, pos=5, head=4, d_head=64, baseline=(2, 1))
        yield partial(ablate_heads, variant=5, batch=2, pos=9, head=wide // 128, d_head=128, baseline=(1, 9))
        yield partial(ablate_heads, variant=5, batch=2, pos=9, head=wide // 128, d_head=128, baseline=(2, 9))
    elif op == "shared_prefix_attention":
        few = {"variant": 5, "batch": 3}
        yield partial(shared_prefix_attention, **few, head=4, kv_head=2, pos=17, d_head=24)
        yield partial(shared_prefix_attention, **few, head=4, kv_head=4, pos=33, d_head=64, softcap=3.0, window=7)
        yield partial(shared_prefix_attention, variant=70, batch=2, head=wide // 128, kv_head=2, pos=65, d_head=128)
    elif op == "slice_grad":
        ragged, heads = ((1, 3), (5, 12), (12, 17)), ((0, 64), (wide - 128, wide))
        yield partial(slice_grad, tokens=1, m=1, n=1)
        yield partial(slice_grad, tokens=70, m=17, n=33, rows=ragged)
        yield partial(slice_grad, tokens=70, m=33, n=20, rows=((3, 30),), columns=ragged, accumulate=True)
        yield partial(slice_grad, tokens=wide, m=wide, n=wide, columns=heads, accumulate=True)
        yield partial(slice_grad, tokens=wide, m=wide, n=wide, rows=heads)
    elif op == "masked_adamw":
        ragged, heads = ((0, 1), (3, 5), (5, 12), (16, 17)), ((0, 64), (wide - 128, wide))
        yield partial(masked_adamw, d_model=17, ranges=ragged)
        yield partial(masked_adamw, d_model=40, ranges=((8, 24), (32, 40)), layers=5, seed=7)
        yield partial(masked_adamw, d_model=300, ranges=tuple((2 * i, 2 * i + 1) for i in range(150)), seed=7)
        yield partial(masked_adamw, d_model=wide, ranges=heads, seed=7)
        yield partial(masked_adamw, d_model=wide, ranges=heads)
    else:
        raise NotImplementedError(f"{op}: an op without problems in bench/gpu_checks.py would go unchecked")


def backends(bench: Bench) -> Iterator[tuple[str, str, torch.dtype, str | None]]:
    """(op, backend, dtype, why it cannot run) of all that belongs to this device; None where it can.

    On a GPU a CUDA or Triton kernel that cannot run is a finding; on the CPU it is left out.
    """
    native = ("cpu",) if bench.device.type == "cpu" else ("cuda", "triton")
    for dtype in DTYPES:
        for row in ops.report(dtype):
            missing = row.reason is not None and row.reason.startswith(f"{row.op} has no")
            if missing or row.backend not in (*native, "reference"):
                continue
            reason = ops.why_not(row.op, row.backend, bench.device, dtype)
            if reason is None or not bench.tiny:
                yield row.op, row.backend, dtype, reason


def name_of(op: str, backend: str, dtype: torch.dtype) -> str:
    return f"check {op} {backend} {str(dtype).removeprefix('torch.')}"


def cases(bench: Bench) -> list[Case]:
    return [
        Case("kernels", name_of(op, backend, dtype), partial(check, op=op, backend=backend, dtype=dtype, reason=reason))
        for op, backend, dtype, reason in sorted(backends(bench), key=str)
    ]


def check(bench: Bench, op: str, backend: str, dtype: torch.dtype, reason: str | None) -> None:
    """All problems of one op in one dtype; the record gets the one that came closest to its bound."""
    if reason is not None:
        raise RuntimeError(reason)
    draw = Draw(bench.generator(name_of(op, "", dtype)))  # every backend gets the same inputs
    checks = []
    builds = list(problems(op, bench.tiny))
    for build in builds:
        problem = build(draw, dtype)
        what = f"{op} {backend} {dict(problem.shape)}"
        # Triton compiles anew for pointers of another alignment: the largest problem stands for all
        offsets = (0, 1) if backend != "triton" or build is builds[-1] else (0,)
        checks.append(against_fp64(problem, backend, what, offsets))
        same_bits(bench, problem, backend, what)
    worst = max(checks, key=lambda c: c.error / c.bound)
    name = str(dtype).removeprefix("torch.")
    bench.write(Row(name=f"check {op}", provider=backend, shape={"problems": len(checks)}, dtype=name, check=worst))


def against_fp64(problem: Problem, backend: str, what: str, offsets: Sequence[int] = (0, 1)) -> Check:
    """The error that comes closest to its bound, with tensors that many elements into their buffers; it has passed."""
    run = partial(_run, problem, backend)
    oracle, eager = problem.oracle(problem.fresh()), problem.results_of(problem.eager)
    checks = []
    for offset in offsets:
        found = problem.results_of(run, offset)
        for name, value, plain, exact in zip(problem.results, found, eager, oracle, strict=True):
            bound = 2 * error(plain, exact) + FLOOR[value.dtype]
            place = f"{what}, {name}, {offset} elements off"
            checks.append(Check("fp64", error(value, exact), bound).require(place))
    return max(checks, key=lambda c: c.error / c.bound)


def same_bits(bench: Bench, problem: Problem, backend: str, what: str) -> None:
    """Raise unless a second run, another stream and a captured graph repeat the first run's bits."""
    run = partial(_run, problem, backend)
    first = problem.results_of(run)
    again = {"a second run": problem.results_of(run)}
    with bench.clock.other_stream():
        again["another stream"] = problem.results_of(run)
    arguments, start = problem.fresh(), problem.fresh()
    replay = bench.clock.captured(partial(run, arguments))
    for name, tensor in arguments.items():
        if tensor is not None:
            fill(tensor, start[name])
    replay()
    again["a replayed graph"] = [arguments[name] for name in problem.results]
    bench.clock.synchronise()
    for how, values in again.items():
        for name, value, expected in zip(problem.results, values, first, strict=True):
            if not torch.equal(value, expected):
                raise ValueError(f"{what}: {name} of {how} differs from the first run by {error(value, expected):.3g}")


def _run(problem: Problem, backend: str, arguments: dict) -> object:
    return problem.run(arguments, backend)
