"""Problems for `masked_adamw`: weights, slices of them, gradients; and the update in fp64 by torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from cases import make

from pyarith import ops

Tensor = torch.Tensor
Pair = tuple[int, int]
Place = Callable[[Tensor], Tensor]

NUMBERS = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
# (shape of the weight, dimension, ranges): one range, several, adjacent ones, the last column, everything, odd sizes
SMALL: tuple[tuple[tuple[int, ...], int, tuple[Pair, ...]], ...] = (
    ((40, 24), 0, ((8, 24),)),
    ((24, 40), 1, ((0, 8), (16, 24), (24, 40))),
    ((5, 7), 0, ((0, 1), (2, 3), (3, 5))),
    ((5, 7), 1, ((0, 3), (6, 7))),
    ((255,), 0, ((0, 255),)),
    ((9,), 0, ((4, 5), (8, 9))),
    ((3, 255), 1, ((0, 255),)),
    ((1, 1), 1, ((0, 1),)),
    ((5, 45), 1, ((0, 8), (16, 24))),
)


@dataclass
class Problem:
    """The arguments of one step that are tensors or say where slices lie, each a list with one entry per slice."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    weights: list[Tensor]
    ranges: list[Sequence[Pair]]
    dims: list[int]
    numbers: dict[str, object] = field(default_factory=dict)  # over NUMBERS, and grad_scale, seed, step

    def changed(self) -> list[Tensor]:
        """Everything that a step writes to."""
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.weights]

    def copy(self, place: Place = torch.Tensor.clone) -> Problem:
        names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "weights")
        lists = {name: [place(tensor) for tensor in getattr(self, name)] for name in names}
        scale = self.numbers.get("grad_scale")
        numbers = self.numbers | ({} if scale is None else {"grad_scale": place(scale)})
        return replace(self, **lists, numbers=numbers)

    def draw_grads(self, step: int) -> None:
        """New gradients of very different sizes, the same for the same step."""
        total = sum(param.numel() for param in self.params)
        drawn, size = make(2, total, dtype=torch.float64, seed=step)
        pieces = (drawn * 10 ** (2 * size - 2)).split([param.numel() for param in self.params])
        self.grads = [
            piece.view(param.shape).to(param.dtype).to(param.device)
            for piece, param in zip(pieces, self.params, strict=True)
        ]

    def step(self, number: int, backend: str) -> None:
        ops.masked_adamw(
            self.params,
            self.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.weights,
            self.ranges,
            self.dims,
            **{**NUMBERS, "step": number, **self.numbers},
            backend=backend,
        )

    def entry_arguments(self, step: int = 1) -> tuple:
        """As the torch entry takes them, without ``backend``."""
        lists = (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.weights)
        bounds = [bound for ranges in self.ranges for pair in ranges for bound in pair]
        counts = [len(ranges) for ranges in self.ranges]
        scale, seed = self.numbers.get("grad_scale"), self.numbers.get("seed")
        numbers = [self.numbers.get(name, usual) for name, usual in NUMBERS.items()]
        return (*lists, bounds, counts, self.dims, scale, *numbers, step, seed)


def views(weight: Tensor, dim: int, ranges: Sequence[Pair]) -> list[Tensor]:
    return [weight.narrow(dim, start, stop - start) for start, stop in ranges]


def problem(dtype: torch.dtype, cases: Sequence = SMALL, **numbers: object) -> Problem:
    """Slices of random weights of ``dtype`` with the low bits that a master has, and moments as after some steps."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    weights = [make(*shape, dtype=dtype, seed=i) for i, (shape, _, _) in enumerate(cases)]
    params = [
        torch.cat(views(w, dim, ranges), dim).to(wide) for w, (_, dim, ranges) in zip(weights, cases, strict=True)
    ]
    params = [(p * (1 + 2.0**-10 * make(*p.shape, seed=7))).to(wide).contiguous() for p in params]
    made = Problem(
        params,
        [torch.empty_like(p) for p in params],
        [make(*p.shape, dtype=wide, seed=8) * 1e-2 for p in params],
        [make(*p.shape, dtype=wide, seed=9).square() * 1e-4 for p in params],
        weights,
        [ranges for _, _, ranges in cases],
        [dim for _, dim, _ in cases],
        numbers,
    )
    made.draw_grads(0)
    return made


def by_torch(given: Problem, dtype: torch.dtype, steps: Sequence[int]) -> list[Tensor]:
    """params, exp_avgs and exp_avg_sqs after ``steps`` by torch.optim.AdamW in ``dtype``; gradients as drawn."""
    values = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in given.params]
    n = {**NUMBERS, **given.numbers}
    betas = (n["beta1"], n["beta2"])
    optimizer = torch.optim.AdamW(values, n["lr"], betas, n["eps"], n["weight_decay"], foreach=False)
    moments = zip(values, given.exp_avgs, given.exp_avg_sqs, strict=True)
    for value, exp_avg, exp_avg_sq in moments:
        optimizer.state[value] = {
            "step": torch.tensor(float(steps[0] - 1)),
            "exp_avg": exp_avg.to(dtype, copy=True),
            "exp_avg_sq": exp_avg_sq.to(dtype, copy=True),
        }
    drawn, scale = given.copy(), n.get("grad_scale")
    for step in steps:
        drawn.draw_grads(step)
        for value, grad in zip(values, drawn.grads, strict=True):
            value.grad = grad.to(dtype) if scale is None else grad.to(dtype) * scale.to(dtype)
        optimizer.step()
    names = ("exp_avg", "exp_avg_sq")
    return [value.detach() for value in values] + [optimizer.state[v][name] for name in names for v in values]
