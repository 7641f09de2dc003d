"""`slice_grad` of 16 heads in three layers, against the gradients of whole weights and against those with a mask.

A run is one backward pass's weight gradients of the heads' rows of W_Q, W_K, W_V and columns of W_O. "full gradient" is
what full fine-tuning computes for these twelve weights, "full gradient + mask" what masking frameworks do with it, and
"product per range" the plain way without a copy: one product per layer, weight and head.
Every provider's slices are held against fp64; those of a bf16 gradient, which is rounded to bf16, with that rounding.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import RESULTS, Check, Record, Row, Timing, calls_for, relative_error, repeated, time_rounds
from op_bench import FLOORS, GEMM_SIZE, available_backends

HEADS = ((0, 3, 4, 7, 10), (1, 2, 5, 8, 11), (0, 2, 4, 6, 8, 10))  # of each layer: 16 of 36
TOKENS, N_HEADS, D_HEAD = 1024, 12, 64
Tensor = torch.Tensor
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Weight:
    """One weight [out, in]: gradient of its layer's result, its input, and which rows or columns are wanted."""

    grad_y: Tensor
    x: Tensor
    ranges: Ranges
    rows: bool

    def taken(self, full: Tensor) -> Tensor:
        parts = [full[start:stop] if self.rows else full[:, start:stop] for start, stop in self.ranges]
        return torch.cat(parts, 0 if self.rows else 1)

    def empty(self) -> Tensor:
        size = sum(stop - start for start, stop in self.ranges)
        return torch.empty((size, self.x.shape[1]) if self.rows else (self.grad_y.shape[1], size))


def weights(
    tokens: int, heads: tuple[tuple[int, ...], ...], n_heads: int, d_head: int, dtype: torch.dtype
) -> list[Weight]:
    torch.manual_seed(0)
    d_model, made = n_heads * d_head, []
    for layer in heads:
        ranges: Ranges = tuple((head * d_head, (head + 1) * d_head) for head in layer)
        x = torch.randn(tokens, d_model).to(dtype)  # W_Q, W_K and W_V read the same
        inputs = [x, x, x, torch.randn(tokens, d_model).to(dtype)]
        made += [
            Weight(torch.randn(tokens, d_model).to(dtype), one, ranges, rows)
            for one, rows in zip(inputs, (True, True, True, False), strict=True)
        ]
    return made


Provider = tuple[Callable[[], object], Callable[[], list[Tensor]]]


def providers(known: list[Weight], dtype: torch.dtype) -> dict[str, Provider]:
    """Name -> (what is timed, the slices that it left)."""
    from pyarith import ops

    full = [torch.empty(one.grad_y.shape[1], one.x.shape[1], dtype=dtype) for one in known]
    parts = [one.empty() for one in known]
    masks = [torch.zeros_like(grad) for grad in full]
    for one, mask in zip(known, masks, strict=True):
        for start, stop in one.ranges:
            (mask[start:stop] if one.rows else mask[:, start:stop]).fill_(1)

    def whole() -> None:
        for one, grad in zip(known, full, strict=True):
            torch.mm(one.grad_y.T, one.x, out=grad)

    def masked() -> None:
        whole()
        for grad, mask in zip(full, masks, strict=True):
            grad.mul_(mask)

    def per_range() -> None:
        for one, part in zip(known, parts, strict=True):
            left, right, at = one.grad_y.float(), one.x.float(), 0
            for start, stop in one.ranges:
                if one.rows:
                    torch.mm(left[:, start:stop].T, right, out=part[at : at + stop - start])
                else:
                    torch.mm(left.T, right[:, start:stop], out=part[:, at : at + stop - start])
                at += stop - start

    def sliced(backend: str) -> None:
        for one, part in zip(known, parts, strict=True):
            sides = (one.ranges, None) if one.rows else (None, one.ranges)
            ops.slice_grad(one.grad_y, one.x, part, *sides, backend=backend)

    def of_full() -> list[Tensor]:
        return [one.taken(grad) for one, grad in zip(known, full, strict=True)]

    made: dict[str, Provider] = {
        "full gradient": (whole, of_full),
        "full gradient + mask": (masked, of_full),
        "product per range": (per_range, lambda: parts),
    }
    for backend in available_backends("slice_grad", dtype):
        made[backend] = (lambda backend=backend: sliced(backend), lambda: parts)
    return made


def run_case(record: Record, dtype: torch.dtype, quick: bool, rounds: int) -> None:
    heads, sizes = (((0, 2),), (16, 4, 8)) if quick else (HEADS, (TOKENS, N_HEADS, D_HEAD))
    known = weights(sizes[0], heads, *sizes[1:], dtype)
    made = providers(known, dtype)
    oracle = [one.taken(one.grad_y.double().T @ one.x.double()) for one in known]
    errors = {}
    for name, (call, read) in made.items():
        call()
        errors[name] = max(relative_error(*pair) for pair in zip(read(), oracle, strict=True))
    bound = 2 * errors["product per range"] + FLOORS[torch.float32]
    rounded = {"full gradient": 4 * torch.finfo(dtype).eps, "full gradient + mask": 4 * torch.finfo(dtype).eps}
    checks = {name: Check("fp64", error, max(bound, rounded.get(name, 0.0))) for name, error in errors.items()}
    square = torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=dtype)
    product = torch.empty_like(square)
    calls: dict[str, Callable[[], object]] = {name: call for name, (call, _) in made.items()}
    calls["gemm"] = lambda: torch.mm(square, square, out=product)
    bundles = {name: calls_for(call) for name, call in calls.items()}
    samples = time_rounds({name: repeated(call, bundles[name]) for name, call in calls.items()}, rounds)
    seconds = {name: Timing.of(values).scaled(1 / bundles[name]) for name, values in samples.items()}
    rate = 2 * GEMM_SIZE**3 / seconds["gemm"].median
    flops = {
        "all": 2.0 * sum(one.grad_y.shape[1] * one.x.numel() for one in known),
        "slices": 2.0 * sum(sizes[0] * part.numel() for part in oracle),
    }
    for name in made:
        flop = flops["all" if name in rounded else "slices"]
        record.write(
            Row(
                name="slice_grad",
                provider=name,
                shape={"tokens": sizes[0], "d_model": sizes[1] * sizes[2], "d_head": sizes[2], "heads": heads},
                dtype=str(dtype).removeprefix("torch."),
                check=checks[name],
                seconds=seconds[name],
                flop=flop,
                share_of_roofline=flop / rate / seconds[name].median,
                extra={
                    "speedup_over_full_gradient": seconds["full gradient"].median / seconds[name].median,
                    "share_of_flop": flops["slices"] / flops["all"],
                    "gemm_flop_per_s": rate,
                },
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to")
    arguments = parser.parse_args()
    record = Record(arguments.out or RESULTS / ("quick.jsonl" if arguments.quick else "ops.jsonl"), arguments.quick)
    for dtype in (torch.float32, torch.bfloat16):
        run_case(record, dtype, arguments.quick, arguments.rounds)


if __name__ == "__main__":
    main()
