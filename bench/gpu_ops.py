"""Stages "ceilings" and "ops": what this device can do, and each kernel at the replay sizes of a 7B model against it.

A kernel is timed only on a backend that passed its checks, and only after its result at the timed size was held against
fp64. Its ceiling is the longer of its bytes at the copy bandwidth and its FLOP at the GEMM rate, both of this run.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from gpu_adamw import masked_adamw
from gpu_checks import backends, name_of
from gpu_problems import (
    EPS,
    Arguments,
    Draw,
    Problem,
    ablate_heads,
    add_norm,
    answer_logits,
    gated_act,
    head_write_rows,
    shared_prefix_attention,
    slice_grad,
    vocab_logsumexp,
)
from gpu_work import Bench, Case, NotMeasured
from harness import Check, Row, Timing, relative_error
from tolerances import FLOOR, error

from pyarith import ops
from pyarith.ops._triton import why_not as why_not_triton

BF16 = torch.bfloat16
ROUNDS = 20
COPY_SHARE = 0.85  # of the copy bandwidth: what a kernel bound by memory traffic should reach
D_MODEL, D_MLP = 4096, 11008
GEMMS = {"gemm up": (16384, D_MODEL, D_MLP), "gemm down": (16384, D_MLP, D_MODEL), "gemm square": (8192, 8192, 8192)}


def rounds(bench: Bench) -> int:
    return 3 if bench.tiny else ROUNDS


def size(bench: Bench, full: int, tiny: int) -> int:
    return tiny if bench.tiny else full


def cases(bench: Bench) -> list[Case]:
    planned = [Case("ceilings", "copy", copy)]
    planned += [Case("ceilings", name, partial(gemm, shape=shape)) for name, shape in GEMMS.items()]
    for op, what, build in large(bench):
        planned.append(Case("ops", f"time {what}", partial(time_op, op=op, build=build)))
    return [*planned, Case("ops", "time gate_up_candidate", gate_up)]


def copy(bench: Bench) -> None:
    """Device to device; bytes read and written both count."""
    count = size(bench, 2 * 2**30, 2**20) // 4
    source = Draw(bench.generator("copy"))(count)
    target = torch.empty_like(source)
    timing = bench.clock.rounds({"copy": lambda: target.copy_(source)}, rounds(bench))["copy"]
    moved = 2.0 * source.nbytes
    rate = moved / timing.median
    check = Check("source", relative_error(target, source), 0.0)
    bench.values["per_s"] = rate
    bench.write(
        Row(
            "copy",
            "torch",
            {"bytes": source.nbytes},
            "float32",
            check,
            timing,
            bytes=moved,
            extra={"bytes_per_s": rate},
        )
    )
    bench.figure("device-to-device copy", f"{rate / 1e12:.3f} TB/s read + written")


def gemm(bench: Bench, shape: tuple[int, int, int]) -> None:
    """A product as a linear layer asks for it: rows times a transposed weight."""
    rows, inner, columns = (size(bench, n, n // 64) for n in shape)
    draw = Draw(bench.generator(bench.case))
    x, weight = draw(rows, inner, dtype=BF16), draw(columns, inner, dtype=BF16)
    out = torch.empty(rows, columns, dtype=BF16, device=bench.device)
    timing = bench.clock.rounds({"gemm": lambda: torch.mm(x, weight.T, out=out)}, rounds(bench))["gemm"]
    oracle = x[:8].double() @ weight.double().T
    check = Check("fp64 product", relative_error(out[:8], oracle), 4 * torch.finfo(BF16).eps)
    flop = 2.0 * rows * inner * columns
    bench.write(
        Row(
            name=bench.case,
            provider="torch",
            shape={"rows": rows, "inner": inner, "columns": columns},
            dtype="bfloat16",
            check=check,
            seconds=timing,
            flop=flop,
            extra={"flop_per_s": flop / timing.median},
        )
    )
    bench.values["per_s"] = flop / timing.median
    bench.figure(f"{bench.case} {rows} x {inner} x {columns} bf16", f"{flop / timing.median / 1e12:.1f} TFLOP/s")


def gemm_rate(bench: Bench) -> float | None:
    """FLOP per second of a gated MLP: two products up, one down."""
    up, down = bench.value("gemm up", "per_s"), bench.value("gemm down", "per_s")
    return None if up is None or down is None else 3 / (2 / up + 1 / down)


def large(bench: Bench) -> Iterator[tuple[str, str, Callable[[Draw], Problem]]]:
    """(op, name, problem) at the row blocks of a replay of 100 prompts through LLaMA2-7B."""
    d, heads = size(bench, D_MODEL, 256), size(bench, 32, 2)
    rows = {"variant": size(bench, 1088, 6), "batch": 15, "d_model": d}
    wide = {"rows": size(bench, 16384, 64), "d_mlp": size(bench, D_MLP, 688)}
    yield "add_norm", "add_norm rms", partial(add_norm, dtype=BF16, **rows)
    yield "add_norm", "add_norm layer", partial(add_norm, dtype=BF16, **rows, kind="layer")
    yield "gated_act", "gated_act", partial(gated_act, dtype=BF16, **wide)
    yield "answer_logits", "answer_logits", partial(answer_logits, dtype=BF16, k=1, **rows)
    yield "ablate_heads", "ablate_heads", partial(
        ablate_heads, dtype=BF16, variant=size(bench, 64, 3), batch=size(bench, 8, 2), pos=size(bench, 128, 8),
        head=heads, d_head=128, baseline=(1, 1), one_head=True,
    )  # fmt: skip
    yield "head_write_rows", "head_write_rows", partial(writes, batch=size(bench, 100, 10), head=heads, d_model=d)
    yield (
        "vocab_logsumexp",
        "vocab_logsumexp",
        partial(vocab_logsumexp, dtype=BF16, rows=wide["rows"], d_model=d, d_vocab=size(bench, 32000, 999)),
    )
    tuned = tuple((128 * head, 128 * head + 128) for head in ((1, 5, 6, 20, 31) if heads == 32 else (1,)))
    for side in ("rows", "columns"):
        build = partial(slice_grad, dtype=BF16, tokens=size(bench, D_MODEL, 64), m=d, n=d, **{side: tuned})
        yield "slice_grad", f"slice_grad {side}", build
    step = partial(masked_adamw, dtype=BF16, d_model=d, ranges=tuned, layers=size(bench, 7, 2))
    yield "masked_adamw", "masked_adamw", step
    yield "masked_adamw", "masked_adamw stochastic", partial(step, seed=7)
    yield (
        "shared_prefix_attention",
        "shared_prefix_attention",
        partial(attention, variant=size(bench, 1024, 16), batch=size(bench, 8, 2), head=heads, pos=size(bench, 64, 16)),
    )


def writes(draw: Draw, batch: int, head: int, d_model: int) -> Problem:
    """head_write_rows and the norm that follows it in a replay, against a bf16 product and an add_norm that adds it."""
    problem = head_write_rows(draw, BF16, batch, head, 128, d_model)
    weight, normed = draw(d_model, dtype=BF16), draw.empty(head, batch, d_model, dtype=BF16)

    def ours(t: Arguments) -> None:
        ops.head_write_rows(**t)
        ops.add_norm(t["out"], None, None, weight, None, EPS, "rms", out=normed)

    def product(t: Arguments) -> None:
        t["out"].copy_(t["base"].expand(t["out"].shape))
        delta = torch.bmm(t["dz"].to(BF16).transpose(0, 1), t["w_o"])
        ops.add_norm(t["out"], delta, None, weight, None, EPS, "rms", out=normed)

    rounded = 4 * torch.finfo(BF16).eps
    return replace(problem, rivals={"head_write_rows + add_norm": (ours, None), "bmm + add_norm": (product, rounded)})


def attention(draw: Draw, variant: int, batch: int, head: int, pos: int) -> Problem:
    """Against torch's attention on keys and values that were expanded to every variant before the clock started."""
    problem = shared_prefix_attention(draw, BF16, variant, batch, head, head, pos, 128, ragged=False)
    t = problem.arguments
    expanded = [
        torch.cat([t[name].expand(variant, *t[name].shape), t[f"{name}_own"][:, :, None]], 2)
        .transpose(2, 3)
        .flatten(0, 1)
        for name in ("k", "v")
    ]

    def sdpa(t: Arguments) -> None:
        found = F.scaled_dot_product_attention(t["q"].flatten(0, 1)[:, :, None], *expanded)
        t["out"] = found.view(t["out"].shape)

    return replace(problem, rivals={"sdpa": (sdpa, 4 * torch.finfo(BF16).eps)})


def time_op(bench: Bench, op: str, build: Callable[[Draw], Problem]) -> None:
    """Check and time every backend that passed its checks, plain PyTorch and the rivals; one row each."""
    here = [backend for name, backend, dtype, _ in backends(bench) if (name, dtype) == (op, BF16)]
    passed = [b for b in here if bench.passed(name_of(op, b, BF16)) and (bench.tiny or b != "reference")]
    if ops.backend_of(op, bench.device, BF16) not in passed:
        raise NotMeasured(f"the checks of {op} did not pass")
    problem = build(Draw(bench.generator(bench.case)))
    calls: dict[str, tuple[Callable[[Arguments], object], float | None]] = {
        **{backend: (partial(_run, problem, backend), None) for backend in passed},
        **problem.rivals,
        "torch": (problem.eager, None),
    }
    checks = _checks(problem, calls, bench.case)
    sets = {name: problem.fresh() for name in calls}
    timings = bench.clock.rounds({name: partial(call, sets[name]) for name, (call, _) in calls.items()}, rounds(bench))
    ceiling = _ceiling(bench, problem)
    for name, timing in timings.items():
        share = None if ceiling is None or name in problem.rivals else ceiling / timing.median
        bench.write(
            Row(
                name=op,
                provider=name,
                shape=problem.shape,
                dtype="bfloat16",
                check=checks[name],
                seconds=timing,
                flop=problem.flop,
                bytes=problem.bytes,
                share_of_roofline=share,
                extra={"speedup_over_torch": timings["torch"].median / timing.median},
            )
        )
    for backend in passed:
        _figures(bench, op, backend, timings, problem, ceiling)


def _run(problem: Problem, backend: str, arguments: Arguments) -> object:
    return problem.run(arguments, backend)


def _checks(
    problem: Problem, calls: Mapping[str, tuple[Callable[[Arguments], object], float | None]], what: str
) -> dict[str, Check]:
    oracle = problem.oracle(problem.fresh())[0]
    plain = problem.results_of(problem.eager)[0]
    rule = 2 * error(plain, oracle) + FLOOR[plain.dtype]
    checks = {}
    for name, (call, bound) in calls.items():
        found = problem.results_of(call)[0]
        checks[name] = Check("fp64", error(found, oracle), bound or rule).require(f"{what}, {name}")
    return checks


def _ceiling(bench: Bench, problem: Problem) -> float | None:
    bandwidth, rate = bench.value("copy", "per_s"), gemm_rate(bench)
    if bandwidth is None or rate is None:
        return None
    return max(problem.bytes / bandwidth, (problem.flop or 0.0) / rate)


def _figures(
    bench: Bench, op: str, backend: str, timings: Mapping[str, Timing], problem: Problem, ceiling: float | None
) -> None:
    """One line per backend; the targets are those of the one that "auto" takes."""
    timing, torch_time = timings[backend].median, timings["torch"].median
    share = None if ceiling is None else ceiling / timing
    text = f"{timing * 1e3:.3f} ms, {problem.bytes / timing / 1e12:.2f} TB/s, {torch_time / timing:.2f}x torch"
    text += "" if share is None else f", {share:.1%} of the ceiling"
    target, reached = "", None
    if backend == ops.backend_of(op, bench.device, BF16):
        if problem.flop is None:
            target, reached = f">= {COPY_SHARE:.0%} of copy", None if share is None else share >= COPY_SHARE
            if "torch fused, slices only" in timings:
                text += f", {timings['torch fused, slices only'].median / timing:.2f}x torch's fused on the slices"
        elif "sdpa" in timings:
            ratio = timings["sdpa"].median / timing
            text, target, reached = f"{text}, {ratio:.2f}x sdpa", ">= 3x sdpa", ratio >= 3
        elif "full gradient, gathered" in timings:
            full, vendor = (timings[name].median for name in ("full gradient, gathered", "vendor product"))
            text += f", {full / timing:.2f}x full gradient, {vendor / timing:.2f}x vendor product"
            target, reached = ">= 1x both", timing <= min(full, vendor)
        elif "bmm + add_norm" in timings:
            ours, theirs = (timings[f"{name} + add_norm"].median for name in ("head_write_rows", "bmm"))
            text += f", with add_norm {ours * 1e3:.3f} ms, bmm + add_norm {theirs * 1e3:.3f} ms"
            target, reached = "<= bmm + add_norm", ours <= theirs
    bench.figure(f"{bench.case.removeprefix('time ')} {backend}", text, target, reached)


def gate_up(bench: Bench) -> None:
    """Two cuBLAS products and gated_act against the candidate that does all three in one kernel."""
    n, d, d_mlp = size(bench, 16384, 32), size(bench, D_MODEL, 64), size(bench, D_MLP, 172)
    draw = Draw(bench.generator(bench.case))
    x, w_gate, w_up = draw(n, d, dtype=BF16), *(draw(d_mlp, d).div_(d**0.5).to(BF16) for _ in range(2))
    gate, up, fused = (draw.empty(n, d_mlp, dtype=BF16).fill_(torch.nan) for _ in range(3))

    def products() -> torch.Tensor:
        torch.mm(x, w_gate.T, out=gate)
        torch.mm(x, w_up.T, out=up)
        return ops.gated_act(gate, up, "silu", out=gate)

    def candidate() -> torch.Tensor:
        from gate_up_candidate import launch

        launch(x, w_gate, w_up, None, None, fused, "silu")
        return fused

    head = x[:64].double()
    oracle = F.silu(head @ w_gate.double().T) * (head @ w_up.double().T)
    bound = 2 * error(products()[:64], oracle) + FLOOR[BF16]
    reason = why_not_triton(bench.device, BF16)
    calls = {"mm + mm + gated_act": products, **({} if reason else {"candidate": candidate})}
    checks = {name: Check("fp64", error(call()[:64], oracle), bound).require(name) for name, call in calls.items()}
    timings = bench.clock.rounds(calls, rounds(bench))
    rate, flop = bench.value("gemm up", "per_s"), 4.0 * n * d * d_mlp
    for name, timing in timings.items():
        share = None if rate is None else flop / rate / timing.median
        shape = {"rows": n, "d_model": d, "d_mlp": d_mlp}
        bench.write(Row("gate_up", name, shape, "bfloat16", checks[name], timing, flop=flop, share_of_roofline=share))
    if reason:
        raise NotMeasured(reason)
    ratio = timings["mm + mm + gated_act"].median / timings["candidate"].median
    bench.figure("gate_up_candidate", f"{ratio:.3f}x mm + mm + gated_act", "> 1x, to enter the library", ratio > 1)
