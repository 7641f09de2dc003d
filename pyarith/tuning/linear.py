"""A linear projection whose own forward runs on the full weight and whose gradient exists for a slice of it only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyarith import ops
from pyarith.models.weights import adds_bias_apart, takes_in_first
from pyarith.tuning.slices import Ranges


@dataclass(frozen=True)
class How:
    """How a projection computes.

    Attributes:
        in_first: its weight is [in, out] (Conv1D), not [out, in].
        bias_apart: its product is rounded before the bias is added (FalconLinear).
    """

    in_first: bool
    bias_apart: bool

    @classmethod
    def of(cls, module: nn.Module) -> How:
        return cls(takes_in_first(module), adds_bias_apart(module))


class SlicedLinear(torch.autograd.Function):
    """y = x @ W (+ bias); gradients for x and for the compact slices of W and of the bias.

    The slices stand for rows or columns that W holds already: they take part in the backward pass only. Nothing of
    the size of W is allocated, and no input is kept for a slice that needs no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        part: Tensor | None,
        bias_part: Tensor | None,
        how: How,
        outputs: bool,
        ranges: Ranges | None,
    ) -> Tensor:
        y = project(x, weight, bias, how)
        kept = None
        if part is not None and part.requires_grad:
            # columns of W meet only their own features of x; autocast computed in the dtype of y
            kept = (x if outputs else _taken(x, ranges)).to(y.dtype)
        ctx.save_for_backward(weight, *([] if kept is None else [kept]))
        ctx.in_first, ctx.outputs, ctx.ranges, ctx.dtype = how.in_first, outputs, ranges, x.dtype
        ctx.parts = (None if part is None else part.dtype, None if bias_part is None else bias_part.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, *saved = ctx.saved_tensors
        grad_x = grad_part = grad_bias = None
        if ctx.needs_input_grad[0]:
            matrix = weight.to(grad.dtype)
            grad_x = (grad @ (matrix.t() if ctx.in_first else matrix)).to(ctx.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[3]:
            x = saved[0].reshape(-1, saved[0].shape[-1])  # of W_O's columns only their features were kept
            left, right = (rows, ctx.ranges if ctx.outputs else None), (x, None)
            if ctx.in_first:
                left, right = right, left
            shape = [_width(*one) for one in (left, right)]
            grad_part = torch.empty(shape, dtype=ctx.parts[0], device=grad.device)
            ops.slice_grad(left[0], right[0], grad_part, left[1], right[1])
        if ctx.needs_input_grad[4]:
            grad_bias = _taken(rows, ctx.ranges).sum(0, dtype=ctx.parts[1])
        return grad_x, None, None, grad_part, grad_bias, None, None, None


def project(x: Tensor, weight: Tensor, bias: Tensor | None, how: How) -> Tensor:
    """The forward of nn.Linear, Conv1D or FalconLinear, by the same calls."""
    if how.bias_apart:
        y = x @ weight.T
        return y if bias is None else y + bias
    if not how.in_first:
        return F.linear(x, weight, bias)
    assert bias is not None  # Conv1D always has one
    return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


def _width(x: Tensor, ranges: Ranges | None) -> int:
    return x.shape[-1] if ranges is None else sum(stop - start for start, stop in ranges)


def _taken(x: Tensor, ranges: Ranges | None) -> Tensor:
    """The features of ``ranges`` [..., feature], side by side; None takes all."""
    if ranges is None:
        return x
    parts = [x[..., start:stop] for start, stop in ranges]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, -1)
