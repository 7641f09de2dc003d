"""`masked_adamw`: one AdamW step on compact slices of weights, each new value written into its place in the weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from pyarith.errors import InputError, InputTypeError
from pyarith.ops import _native
from pyarith.ops._contract import (
    FLOATS,
    WIDE,
    Pair,
    expect_like,
    expect_no_grad,
    expect_ranges,
    expect_shape,
    expect_tensor,
    flat_bounds,
    split_bounds,
)
from pyarith.ops._random import MASK, noise, rounded_by
from pyarith.ops._registry import Backend, define
from pyarith.ops._triton import why_not as why_not_triton

Tensor = torch.Tensor
Tensors = Sequence[Tensor]

_F32, _F64, _BF16 = torch.float32, torch.float64, torch.bfloat16


class Factors(NamedTuple):
    """What the update multiplies by; every backend rounds these to the dtype of the slices."""

    shrink: float
    blend: float
    from_grad: bool
    keep: float
    second: float
    unbias: float
    rate: float
    eps: float


def factors_of(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> Factors:
    """The numbers of one step, worked out in fp64."""
    return Factors(
        shrink=lr * weight_decay,
        blend=min(1 - beta1, beta1),
        from_grad=beta1 < 0.5,
        keep=beta2,
        second=1 - beta2,
        unbias=1 / math.sqrt(1 - beta2**step),
        rate=lr / (1 - beta1**step),
        eps=eps,
    )


def _check_compact(name: str, tensors: Tensors, shapes: Sequence[torch.Size], like: Tensor, strided: bool) -> None:
    """Raise unless ``tensors`` have ``shapes``, those of params, and the device and dtype of ``like``."""
    device, dtype = like.device, like.dtype
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if tensor.shape != shape:
            expect_shape(f"{name}[{i}]", tensor, shape, f"that of params[{i}]")
        if tensor.dtype is not dtype or tensor.device != device:
            expect_like(f"{name}[{i}]", tensor, device, frozenset((dtype,)))
        if not (strided or tensor.is_contiguous()):
            raise InputError(f"{name}[{i}]: expected a contiguous tensor, got strides {tensor.stride()}")


def _check_place(i: int, shape: torch.Size, weight: Tensor, dim: int, bounds: Sequence[int], like: Tensor) -> None:
    """Raise unless slice ``i`` of this ``shape`` lies in ``weight`` where ``bounds`` say."""
    whole, wide = weight.shape, like.dtype is _F64
    if not 0 <= dim < len(shape):
        raise InputError(f"dims[{i}]: expected a dimension of params[{i}], 0 to {len(shape) - 1}; got {dim}")
    if len(whole) != len(shape) or (len(shape) == 2 and whole[1 - dim] != shape[1 - dim]):
        expected = [*map(str, shape)]
        expected[dim] = "any"
        raise InputError(
            f"weights[{i}]: expected the shape of params[{i}] but for dimension {dim}, ({', '.join(expected)}); "
            f"got {tuple(whole)}"
        )
    if weight.device != like.device or weight.dtype not in FLOATS or (weight.dtype is _F64) is not wide:
        expect_like(f"weights[{i}]", weight, like.device, frozenset((_F64,)) if wide else FLOATS - {_F64})
    if not weight.is_contiguous():
        raise InputError(f"weights[{i}]: expected a contiguous tensor, got strides {weight.stride()}")
    taken = expect_ranges(f"ranges[{i}]", bounds, whole[dim])
    if taken != shape[dim]:
        raise InputError(
            f"ranges[{i}]: expected as many in all as params[{i}] has in its dimension {dim}, {shape[dim]}; got {taken}"
        )


def _check_numbers(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, seed: int | None
) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise InputError(f"{name}: expected a finite number >= 0, got {value}")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise InputError(f"{name}: expected a number >= 0 and < 1, got {value}")
    if not 1 <= step <= MASK:
        raise InputError(f"step: expected the number of this step, from 1 to {MASK}; got {step}")
    if seed is not None and not 0 <= seed < 2**63:
        raise InputError(f"seed: expected an integer from 0 to 2^63 - 1, or None; got {seed}")


def _check_apart(written: dict[str, Tensors]) -> None:
    """Raise if one tensor stands twice among those that are written."""
    known = [tensor for tensors in written.values() for tensor in tensors]
    if len(set(map(id, known))) == len(known):
        return
    owners: dict[int, str] = {}
    for name, tensors in written.items():
        for i, tensor in enumerate(tensors):
            other = owners.setdefault(id(tensor), f"{name}[{i}]")
            if other != f"{name}[{i}]":
                raise InputError(
                    f"{name}[{i}]: expected a tensor of its own, got that of {other}; all ranges of a weight make one "
                    "slice"
                )


def _check(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    weights: Tensors,
    bounds: Sequence[int],
    counts: Sequence[int],
    dims: Sequence[int],
    grad_scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int | None,
) -> torch.dtype:
    written = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "weights": weights}
    others = (*written.items(), ("grads", grads), ("ranges", counts), ("dims", dims))
    for name, values in others:
        if len(values) != len(params):
            raise InputError(f"{name}: expected {len(params)}, one for each of params; got {len(values)}")
    if len(bounds) != 2 * sum(counts):
        raise InputError(f"bounds: expected {2 * sum(counts)} numbers, two for each of counts; got {len(bounds)}")
    like = params[0]
    expect_like("params[0]", like, like.device, WIDE)
    _check_apart(written)
    shapes = [param.shape for param in params]
    for i, shape in enumerate(shapes):
        if not 1 <= len(shape) <= 2:
            raise InputError(f"params[{i}]: expected one or two dimensions, got shape {tuple(shape)}")
    for name, tensors in (("params", params), ("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        _check_compact(name, tensors, shapes, like, strided=name == "grads")
    for i, own_bounds in enumerate(split_bounds(bounds, counts)):
        _check_place(i, shapes[i], weights[i], dims[i], own_bounds, like)
        if seed is not None and weights[i].dtype is not _BF16:
            raise InputError(
                f"seed: expected None, as only bfloat16 weights are rounded stochastically and weights[{i}] is "
                f"{str(weights[i].dtype).removeprefix('torch.')}; got {seed}"
            )
    if grad_scale is not None:
        if grad_scale.numel() != 1 or grad_scale.dim() > 1:
            raise InputError(f"grad_scale: expected one number, got shape {tuple(grad_scale.shape)}")
        expect_like("grad_scale", grad_scale, like.device, frozenset((_F32,)))
    _check_numbers(lr, beta1, beta2, eps, weight_decay, step, seed)
    return like.dtype


def reference(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    weights: Tensors,
    bounds: Sequence[int],
    counts: Sequence[int],
    dims: Sequence[int],
    grad_scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int | None,
) -> None:
    """The meaning of the op in plain PyTorch; every line rounds once, as every backend does."""
    by = factors_of(lr, beta1, beta2, eps, weight_decay, step)
    slices = zip(params, grads, exp_avgs, exp_avg_sqs, weights, dims, split_bounds(bounds, counts), strict=True)
    for number, (param, grad, exp_avg, exp_avg_sq, weight, dim, own_bounds) in enumerate(slices):
        if grad_scale is not None:
            grad = grad * grad_scale.to(grad.dtype).view(())
        base, other = (grad, exp_avg) if by.from_grad else (exp_avg, grad)
        exp_avg.copy_(base + (other - base).mul_(by.blend))
        exp_avg_sq.mul_(by.keep).add_((grad * grad).mul_(by.second))
        root = exp_avg_sq.double().sqrt().to(param.dtype)  # in fp32 MKL's misses the nearest value in one of six
        change = (exp_avg / root.mul_(by.unbias).add_(by.eps)).mul_(by.rate)
        param.sub_(change.add_(param * by.shrink))
        value = param
        if seed is not None:
            value = rounded_by(param, noise(seed, step, number, param.numel(), param.device))
        at = 0
        for start, stop in zip(own_bounds[::2], own_bounds[1::2], strict=True):
            weight.narrow(dim, start, stop - start).copy_(value.narrow(dim, at, stop - start))
            at += stop - start


def _prepared(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    weights: Tensors,
    bounds: Sequence[int],
    counts: Sequence[int],
    dims: Sequence[int],
    grad_scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The schema's arguments as the kernels take them: those in order, and those by name. Refuses wrong numbers."""
    _check_numbers(lr, beta1, beta2, eps, weight_decay, step, seed)
    dense = [grad.contiguous() for grad in grads]
    factors = factors_of(lr, beta1, beta2, eps, weight_decay, step)
    listed = (params, dense, exp_avgs, exp_avg_sqs, weights, bounds, counts, dims, grad_scale)
    return listed, {**factors._asdict(), "step": step, "seed": seed}


def _cpu(*args: Any) -> None:
    listed, named = _prepared(*args)
    _native.C.masked_adamw_cpu(*listed, **named, threads=_native.threads())


def _cuda(*args: Any) -> None:
    listed, named = _prepared(*args)
    _native.launch("masked_adamw_cuda", *listed, **named)


def _triton(*args: Any) -> None:
    from pyarith.ops._triton.masked_adamw import launch

    listed, named = _prepared(*args)
    launch(*listed, **named)


_op = define(
    "masked_adamw",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] weights, "
    "int[] bounds, int[] counts, int[] dims, Tensor? grad_scale, float lr, float beta1, float beta2, float eps, "
    'float weight_decay, int step, int? seed, *, str backend="auto") -> ()',
    _check,
    {
        "cpu": Backend(_cpu, ("cpu",), _native.why_not_cpu, guarded=True),
        "cuda": Backend(_cuda, ("cuda",), _native.why_not_cuda, guarded=True),
        "triton": Backend(_triton, ("cuda",), why_not_triton),
        "reference": Backend(reference),
    },
)


def masked_adamw(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    weights: Tensors,
    ranges: Sequence[Sequence[Pair]],
    dims: Sequence[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None = None,
    seed: int | None = None,
    backend: str = "auto",
) -> None:
    """One step of AdamW on compact slices of weights; each new value goes into its place in the full weight, too.

    For every element of every slice, t the number of the step:

    g = grad * grad_scale;  m = m + (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps) - lr weight_decay p
    weight[its place] = p, rounded to the weight's dtype

    The rest of the weight keeps its bits: it is neither read nor written.

    Args:
        params: the slices, [rows, columns] or [rows] each, all fp32 or all fp64, contiguous; changed.
        grads: their gradients, of the same shapes and dtype, any strides.
        exp_avgs, exp_avg_sqs: m and v, like params, contiguous; changed, start at zero.
        weights: the full parameters, of the dimensions of their slices, contiguous; fp32, bf16 or fp16 (each its own)
            beside fp32 slices, fp64 beside fp64 ones; changed where ranges say.
        ranges: for each slice, which rows (dim 0) or columns (dim 1) of its weight it holds, in this order: sorted
            (start, stop) pairs that do not overlap (they may touch). Tensors that are changed share no memory.
        dims: for each slice, the dimension that its ranges count.
        lr, beta1, beta2, eps, weight_decay: as in ``torch.optim.AdamW``.
        step: t, from 1 on.
        grad_scale: one fp32 number on the same device, [] or [1]: a clipping coefficient or the inverse of a loss
            scale. The host never waits for it.
        seed: round into bf16 weights at random, to one of the two neighbours, right on average; None rounds to nearest.
            The bits come from Philox4x32-10 (``noise``), a function of seed, step, slice number and element.
        backend: "auto", or a name of the registry.
    Raises:
        InputError: a shape, dtype, device, range or number differs from the above; the message names the argument and
            the slice, and nothing has been changed.
        InputTypeError: not lists of tensors, or ranges that are not pairs of integers.
        BackendError: the backend asked for cannot run; the message says why.
    Notes:
        All slices are one pass, on a GPU one launch for some 24 slices. Every operation rounds by itself and in this
        order, so all backends give the same bits in fp32, whatever the number of threads. The decay is subtracted
        together with the step: a factor 1 - lr weight_decay, as in PyTorch, would round to a multiple of 6e-8 in fp32.
        fp64 runs on the reference.
    References: Loshchilov and Hutter 2019, arXiv:1711.05101; Salmon et al. 2011, doi:10.1145/2063384.2063405.
    """
    lists = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "weights": weights,
    }
    for name, tensors in lists.items():
        if not isinstance(tensors, (list, tuple)):
            raise InputTypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                expect_tensor(f"{name}[{i}]", tensor)
    if not params:
        raise InputError("params: expected at least one slice, got none")
    expect_no_grad("masked_adamw", *params, *grads, *weights)
    bounds = [flat_bounds(f"ranges[{i}]", one) for i, one in enumerate(ranges)]
    _op(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        weights,
        [bound for one in bounds for bound in one],
        [len(one) // 2 for one in bounds],
        dims,
        grad_scale,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        seed,
        backend=backend,
    )
