"""`masked_adamw` on 16 heads in three layers, against AdamW on the same slices and on every parameter with masks.

A run is one optimizer step for the heads' rows of W_Q, W_K, W_V and columns of W_O, 3.1 M numbers. "torch fused" is
torch.optim.AdamW(fused=True) on the same compact slices; it writes no weights. "torch fused + write" copies the new
values into the weights afterwards, as a hook on any optimizer does. "masked full size" is what masking frameworks do:
every gradient of the 12-layer Llama times its mask, then fused AdamW over every parameter.
Every provider's slices are held against fp64 after one step. Nothing is timed twice in a row: all arrays are larger
than the caches, and in training a step finds them cold.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench_slice_grad import HEADS
from harness import RESULTS, Check, Record, Row, Timing, relative_error, time_rounds
from op_bench import available_backends

FLOOR = 1e-6
FULL = dict(d_model=768, d_head=64, d_mlp=2048, d_vocab=32000, layers=12)
QUICK = dict(d_model=48, d_head=4, d_mlp=64, d_vocab=99, layers=12)
NUMBERS = dict(lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
Tensor = torch.Tensor
Pair = tuple[int, int]


@dataclass
class Slices:
    """Compact slices with weights of their own, so that no provider finds what another one left in a cache."""

    d_model: int
    d_head: int
    dtype: torch.dtype
    ranges: list[tuple[Pair, ...]] = field(default_factory=list)
    dims: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params: list[Tensor] = []
        self.weights: list[Tensor] = []
        for heads in HEADS:
            ranges = tuple((head * self.d_head, (head + 1) * self.d_head) for head in heads)
            for dim in (0, 0, 0, 1):
                weight = torch.randn(self.d_model, self.d_model, generator=generator).mul_(0.02).to(self.dtype)
                self.weights.append(weight)
                self.ranges.append(ranges)
                self.dims.append(dim)
                self.params.append(self.taken(weight, ranges, dim).float())
        self.grads = [torch.randn(p.shape, generator=generator).mul_(1e-3) for p in self.params]
        self.exp_avgs = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.params]

    @staticmethod
    def taken(whole: Tensor, ranges: tuple[Pair, ...], dim: int) -> Tensor:
        return torch.cat([whole.narrow(dim, start, stop - start) for start, stop in ranges], dim)

    def write(self) -> None:
        for param, weight, ranges, dim in zip(self.params, self.weights, self.ranges, self.dims, strict=True):
            sizes = [stop - start for start, stop in ranges]
            for (start, _), part in zip(ranges, param.split(sizes, dim), strict=True):
                weight.narrow(dim, start, part.shape[dim]).copy_(part)

    def result(self) -> Tensor:
        return torch.cat([param.detach().flatten() for param in self.params])


Provider = tuple[Callable[[], object], Callable[[], Tensor]]


def adamw(slices: Slices, dtype: torch.dtype = torch.float32) -> tuple[torch.optim.AdamW, list[Tensor]]:
    """torch's AdamW over copies of the slices in ``dtype``, without weight decay, which masks cannot hold back."""
    values = [torch.nn.Parameter(param.to(dtype, copy=True)) for param in slices.params]
    for value, grad in zip(values, slices.grads, strict=True):
        value.grad = grad.to(dtype)
    return torch.optim.AdamW(values, **NUMBERS, weight_decay=0.0, fused=True), values


def ours(slices: Slices, backend: str, seed: int | None) -> Provider:
    from pyarith import ops

    step = 0
    lists = (slices.params, slices.grads, slices.exp_avgs, slices.exp_avg_sqs, slices.weights)
    numbers = dict(lr=NUMBERS["lr"], eps=NUMBERS["eps"], weight_decay=0.0, beta1=0.9, beta2=0.999, seed=seed)

    @torch.no_grad()
    def run() -> None:
        nonlocal step
        step += 1
        ops.masked_adamw(*lists, slices.ranges, slices.dims, **numbers, step=step, backend=backend)

    return run, slices.result


def fused(slices: Slices, write: bool) -> Provider:
    optimizer, values = adamw(slices)
    slices.params = values

    @torch.no_grad()
    def run() -> None:
        optimizer.step()
        if write:
            slices.write()

    return run, slices.result


def full_size(slices: Slices, d_model: int, d_head: int, d_mlp: int, d_vocab: int, layers: int) -> Provider:
    """All parameters of a Llama in fp32; the chosen weights are the attention of its layers 6 to 8."""
    shapes = [(d_vocab, d_model), (d_vocab, d_model), (d_model,)]
    for layer in range(layers):
        if layer not in range(6, 9):
            shapes += [(d_model, d_model)] * 4
        shapes += [(d_mlp, d_model), (d_mlp, d_model), (d_model, d_mlp), (d_model,), (d_model,)]
    tuned = [torch.nn.Parameter(weight.float()) for weight in slices.weights]
    others = [torch.nn.Parameter(torch.randn(*shape) * 0.02) for shape in shapes]
    masks = [torch.zeros_like(weight, dtype=torch.bool) for weight in (*tuned, *others)]
    for weight in others:
        weight.grad = torch.randn_like(weight) * 1e-3
    for weight, grad, mask, ranges, dim in zip(tuned, slices.grads, masks, slices.ranges, slices.dims, strict=False):
        weight.grad = torch.randn_like(weight) * 1e-3
        for (start, stop), part in zip(ranges, grad.split(d_head, dim), strict=True):
            mask.narrow(dim, start, stop - start).fill_(True)
            weight.grad.narrow(dim, start, stop - start).copy_(part)
    optimizer = torch.optim.AdamW([*tuned, *others], **NUMBERS, weight_decay=0.0, fused=True)

    def run() -> None:
        for weight, mask in zip((*tuned, *others), masks, strict=True):
            weight.grad.mul_(mask)
        optimizer.step()

    def result() -> Tensor:
        parts = zip(tuned, slices.ranges, slices.dims, strict=True)
        return torch.cat([Slices.taken(weight.detach(), *place).flatten() for weight, *place in parts])

    return run, result


def providers(sizes: dict[str, int], dtype: torch.dtype) -> Iterator[tuple[str, Provider]]:
    def fresh() -> Slices:
        return Slices(sizes["d_model"], sizes["d_head"], dtype)

    for backend in set(available_backends("masked_adamw", torch.float32)) - {"reference"}:
        yield backend, ours(fresh(), backend, None)
        if dtype is torch.bfloat16:
            yield f"{backend} stochastic", ours(fresh(), backend, 7)
    yield "torch fused", fused(fresh(), write=False)
    yield "torch fused + write", fused(fresh(), write=True)
    yield "masked full size", full_size(fresh(), **sizes)


def run_dtype(record: Record, sizes: dict[str, int], dtype: torch.dtype, rounds: int) -> None:
    known = dict(providers(sizes, dtype))
    optimizer, values = adamw(Slices(sizes["d_model"], sizes["d_head"], dtype), torch.float64)
    optimizer.step()
    oracle = torch.cat([value.detach().flatten() for value in values])
    for run, _ in known.values():
        run()
    errors = {name: relative_error(result(), oracle) for name, (_, result) in known.items()}
    bound = 2 * errors["torch fused"] + FLOOR
    checks = {name: Check("fp64", error, bound) for name, error in errors.items()}
    moved = oracle.numel() * (28 + dtype.itemsize)
    source = torch.ones(moved // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {name: run for name, (run, _) in known.items()}
    calls["copy"] = lambda: target.copy_(source)
    timings = {name: Timing.of(values) for name, values in time_rounds(calls, rounds).items()}
    for name in known:
        median = timings[name].median
        record.write(
            Row(
                name="masked_adamw",
                provider=name,
                shape={**sizes, "heads": sum(map(len, HEADS)), "elements": oracle.numel()},
                dtype=str(dtype).removeprefix("torch."),
                check=checks[name],
                seconds=timings[name],
                bytes=moved,
                share_of_roofline=timings["copy"].median / median,
                extra={
                    "speedup_over_torch_fused": timings["torch fused"].median / median,
                    "speedup_over_masked_full_size": timings["masked full size"].median / median,
                    "copy_bytes_per_s": moved / timings["copy"].median,
                },
            )
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to")
    arguments = parser.parse_args()
    path = arguments.out or RESULTS / ("quick.jsonl" if arguments.quick else "ops.jsonl")
    for dtype in (torch.float32, torch.bfloat16):
        run_dtype(Record(path, arguments.quick), QUICK if arguments.quick else FULL, dtype, arguments.rounds)
