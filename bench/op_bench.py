"""One operator: every backend against eager PyTorch, checked against fp64, as a share of what this machine can do.

Ceiling of a case, measured in the same rounds: the longer of copying `bytes` in all (half read, half written, in
buffers of that size, so that a case that fits a cache is held against the cache's bandwidth) and `gemm_flop` at the
rate of a 1024^3 product. Allowed error: twice that of eager PyTorch in the same dtype plus a floor of the dtype.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Check, Record, Row, Timing, calls_for, relative_error, repeated, time_rounds

FLOORS = {torch.float32: 1e-6, torch.bfloat16: 2e-3}  # by the dtype of the result
GEMM_SIZE = 1024


@dataclass(frozen=True)
class OpCase:
    """`eager` and `run(backend)` return the op's result; `oracle` is that result from fp64."""

    shape: Mapping[str, Any]
    dtype: torch.dtype
    eager: Callable[[], torch.Tensor]
    run: Callable[[str], torch.Tensor]
    oracle: torch.Tensor
    bytes: float
    gemm_flop: float = 0.0


def available_backends(op: str, dtype: torch.dtype) -> list[str]:
    """Backends of `op` that can run on this machine."""
    from pyarith import ops

    return [row.backend for row in ops.report(dtype) if row.op == op and row.available]


def run_case(record: Record, op: str, case: OpCase, rounds: int) -> None:
    """Check every provider, time them together with the ceilings, write a row each."""
    dtype = str(case.dtype).removeprefix("torch.")
    providers: dict[str, Callable[[], torch.Tensor]] = {"torch": case.eager}
    for backend in available_backends(op, case.dtype):
        providers[backend] = lambda backend=backend: case.run(backend)
    errors = {name: relative_error(call(), case.oracle) for name, call in providers.items()}
    bound = 2 * errors["torch"] + FLOORS[case.eager().dtype]
    checks = {name: Check("fp64", error, bound) for name, error in errors.items()}
    source = torch.ones(int(case.bytes) // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    square = torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=case.dtype)
    product = torch.empty_like(square)
    calls: dict[str, Callable[[], object]] = {
        **providers,
        "copy": lambda: target.copy_(source),
        "gemm": lambda: torch.mm(square, square, out=product),
    }
    bundles = {name: calls_for(call) for name, call in calls.items()}
    samples = time_rounds({name: repeated(call, bundles[name]) for name, call in calls.items()}, rounds)
    seconds = {name: Timing.of(values).scaled(1 / bundles[name]) for name, values in samples.items()}
    gemm_rate = 2 * GEMM_SIZE**3 / seconds["gemm"].median
    ceiling = max(seconds["copy"].median, case.gemm_flop / gemm_rate)
    for name in providers:
        extra = {
            "speedup_over_torch": seconds["torch"].median / seconds[name].median,
            "copy_bytes_per_s": case.bytes / seconds["copy"].median,
            "gemm_flop_per_s": gemm_rate,
        }
        record.write(
            Row(
                name=op,
                provider=name,
                shape=case.shape,
                dtype=dtype,
                check=checks[name],
                seconds=seconds[name],
                flop=case.gemm_flop or None,
                bytes=case.bytes,
                share_of_roofline=ceiling / seconds[name].median,
                extra=extra,
            )
        )


def main(op: str, cases: Callable[[bool], Iterable[OpCase]], description: str | None) -> None:
    """Command line of a bench_<op>.py; `cases(quick)` builds what it times."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to")
    arguments = parser.parse_args()
    record = Record(arguments.out or RESULTS / ("quick.jsonl" if arguments.quick else "ops.jsonl"), arguments.quick)
    for case in cases(arguments.quick):
        run_case(record, op, case, arguments.rounds)


def row_shapes(quick: bool) -> list[tuple[int, int, int]]:
    """(variant, batch, d_model) of replay blocks: the 12 x 12 and 8 x 8 shapes and a 7B model's width."""
    return [(4, 2, 64)] if quick else [(64, 8, 768), (128, 4, 512), (64, 8, 4096)]
