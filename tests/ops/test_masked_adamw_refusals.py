"""masked_adamw: what bad input gets, from the contract and from the extension called past it."""

import math
from dataclasses import replace

import pytest
import torch
from adamw_cases import NUMBERS, SMALL, problem
from cases import make

from pyarith import ops
from pyarith.errors import InputError, InputTypeError

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "weights")


def changed(**values):
    """The first small slices with one thing wrong: lists by (name, index) keys, numbers by name."""

    def change(given):
        for name, value in values.items():
            name, _, index = name.partition("__")
            if index:
                getattr(given, name)[int(index)] = value
            elif name in vars(given):
                setattr(given, name, value)
            else:
                given.numbers[name] = value

    return change


def twice(given):
    given.weights[1] = given.weights[0]


def own_weight(given):
    given.params[0] = given.weights[0]


def shared(given):
    given.exp_avgs[0] = given.params[0].view(16, 24)


REFUSED = (
    (changed(params=[]), "params: expected at least one slice, got none"),
    (changed(params=(make(2) for _ in range(2))), "params: expected a list of tensors, got generator"),
    (changed(grads__1=None), "grads[1]: expected a torch.Tensor, got NoneType"),
    (changed(grads=[make(16, 24)]), "grads: expected 2, one for each of params; got 1"),
    (changed(ranges=[((8, 24),)]), "ranges: expected 2, one for each of params; got 1"),
    (changed(dims=[0, 1, 1]), "dims: expected 2, one for each of params; got 3"),
    (changed(params__0=make(16, 24, dtype=BF16)), "params[0]: expected dtype float32, float64; got bfloat16"),
    (changed(params__1=make(24, 32, dtype=F64)), "params[1]: expected dtype float32; got float64"),
    (changed(params__1=make(2, 3, 4)), "params[1]: expected one or two dimensions, got shape (2, 3, 4)"),
    (changed(grads__1=make(24, 31)), "grads[1]: expected shape that of params[1] = (24, 32), got (24, 31)"),
    (changed(grads__0=make(16, 24, dtype=BF16)), "grads[0]: expected dtype float32; got bfloat16"),
    (changed(exp_avgs__0=make(24, 16)), "exp_avgs[0]: expected shape that of params[0] = (16, 24), got (24, 16)"),
    (changed(exp_avg_sqs__0=make(24, 16).t()), "exp_avg_sqs[0]: expected a contiguous tensor, got strides (1, 16)"),
    (changed(params__0=make(24, 16).t()), "params[0]: expected a contiguous tensor, got strides (1, 16)"),
    (changed(grads__0=torch.empty(16, 24, device="meta")), "grads[0]: expected device cpu"),
    (
        changed(weights__0=make(40)),
        "weights[0]: expected the shape of params[0] but for dimension 0, (any, 24); got (40,)",
    ),
    (
        changed(weights__1=make(25, 40)),
        "weights[1]: expected the shape of params[1] but for dimension 1, (24, any); got",
    ),
    (changed(weights__0=make(40, 24, dtype=F64)), "weights[0]: expected dtype bfloat16, float16, float32; got float64"),
    (changed(weights__0=torch.ones(40, 24, dtype=torch.int8)), "weights[0]: expected dtype bfloat16, float16, float32"),
    (changed(weights__0=make(24, 40).t()), "weights[0]: expected a contiguous tensor, got strides (1, 40)"),
    (changed(dims__0=2), "dims[0]: expected a dimension of params[0], 0 to 1; got 2"),
    (changed(dims__0=-1), "dims[0]: expected a dimension of params[0], 0 to 1; got -1"),
    (
        changed(ranges__0=((8, 23),)),
        "ranges[0]: expected as many in all as params[0] has in its dimension 0, 16; got 15",
    ),
    (changed(ranges__0=((25, 41),)), "lie within 0 ... 40; got (25, 41)"),
    (changed(ranges__0=((-1, 15),)), "lie within 0 ... 40; got (-1, 15)"),
    (changed(ranges__0=((8, 16), (15, 23))), "got (15, 23) after one that ends at 16"),
    (changed(ranges__0=((16, 24), (0, 8))), "ranges[0]: expected sorted (start, stop) pairs"),
    (changed(ranges__0=((8, 24), (30, 30))), "got (30, 30) after one that ends at 24"),
    (changed(ranges__0=((8, 24, 1),)), "ranges[0]: expected (start, stop) pairs of integers, got (8, 24, 1)"),
    (changed(ranges__0=((8, 24.0),)), "ranges[0]: expected (start, stop) pairs of integers, got (8, 24.0)"),
    (twice, "weights[1]: expected a tensor of its own, got that of weights[0]; all ranges of a weight make one slice"),
    (shared, "masked_adamw: params, exp_avgs, exp_avg_sqs, weights: expected tensors that share no memory"),
    (own_weight, "weights[0]: expected a tensor of its own, got that of params[0]"),
    (changed(lr=-1e-3), "lr: expected a finite number >= 0, got -0.001"),
    (changed(lr=math.nan), "lr: expected a finite number >= 0, got nan"),
    (changed(eps=-1e-8), "eps: expected a finite number >= 0"),
    (changed(weight_decay=math.inf), "weight_decay: expected a finite number >= 0, got inf"),
    (changed(beta1=1.0), "beta1: expected a number >= 0 and < 1, got 1.0"),
    (changed(beta2=-0.1), "beta2: expected a number >= 0 and < 1, got -0.1"),
    (changed(step=0), "step: expected the number of this step, from 1 to 4294967295; got 0"),
    (changed(step=2**32), "step: expected the number of this step"),
    (changed(grad_scale=make(2)), "grad_scale: expected one number, got shape (2,)"),
    (changed(grad_scale=make(1, dtype=F64)), "grad_scale: expected dtype float32; got float64"),
    (
        changed(seed=3),
        "seed: expected None, as only bfloat16 weights are rounded stochastically and weights[0] is float32",
    ),
)


@pytest.mark.parametrize("change, words", REFUSED, ids=[words.split(":")[0] for _, words in REFUSED])
def test_refusals_name_the_argument_and_change_nothing(change, words):
    given = problem(F32, SMALL[:2])
    given.numbers = {"step": 1}
    whole = replace(given)  # the same tensors, whatever ``change`` puts in their place
    for name in LISTS:
        setattr(whole, name, list(getattr(given, name)))
    before = whole.copy()
    change(given)
    with pytest.raises((InputError, InputTypeError)) as caught:
        ops.masked_adamw(
            *(getattr(given, name) for name in LISTS),
            given.ranges,
            given.dims,
            **{**NUMBERS, **given.numbers},
        )
    assert words in str(caught.value)
    assert all(map(torch.equal, whole.changed(), before.changed()))


@pytest.mark.parametrize("seed", (-1, 2**63))
def test_seeds_out_of_range(seed):
    given = problem(BF16, SMALL[:1], seed=seed)
    with pytest.raises((InputError, OverflowError, RuntimeError)) as caught:
        given.step(1, "cpu")
    if seed < 0:
        assert "seed: expected an integer from 0 to 2^63 - 1" in str(caught.value)


def test_the_extension_repeats_what_memory_safety_needs():
    from pyarith import _C

    given = problem(BF16, SMALL[:2])
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "weights", "bounds", "counts", "dims", "grad_scale")
    listed = dict(zip(names, given.entry_arguments()[:9], strict=True))
    named = dict(shrink=0.0, blend=0.1, from_grad=False, keep=0.9, second=0.1, unbias=1.0, rate=0.1, eps=0.1)
    for wrong, words in (
        (dict(params=given.params[:1]), "params: expected one of everything for each slice"),
        (dict(counts=[1]), "params: expected one of everything"),
        (dict(grads=[make(16, 23), given.grads[1]]), "slices: expected another shape"),
        (dict(grads=[make(24, 16).t(), given.grads[1]]), "slices: expected a contiguous tensor"),
        (dict(exp_avgs=[None, given.exp_avgs[1]]), "slices: expected tensors, not None"),
        (dict(exp_avg_sqs=[make(16, 24, dtype=BF16), given.exp_avg_sqs[1]]), "slices: expected a dtype"),
        (dict(weights=[make(40, 23, dtype=BF16), given.weights[1]]), "weights: expected another shape"),
        (dict(weights=[make(40, 24, dtype=F64), given.weights[1]]), "weights: expected a dtype"),
        (dict(weights=[make(40), given.weights[1]]), "weights: expected as many dimensions as the slice"),
        (dict(dims=[2, 1]), "dims: expected a dimension of the slice"),
        (dict(bounds=[25, 41, *listed["bounds"][2:]]), "bounds: expected sorted ranges inside the weight"),
        (dict(bounds=[8, 23, *listed["bounds"][2:]]), "bounds: expected ranges that make up the slice"),
        (dict(bounds=listed["bounds"][:-2]), "bounds: expected two numbers for each range"),
        (dict(bounds=[*listed["bounds"], 0, 1]), "bounds: expected two numbers for each range"),
        (dict(grad_scale=make(2)), "grad_scale: expected another shape"),
        (dict(grad_scale=make(1, 1)), "grad_scale: expected another shape"),
        (dict(exp_avgs=given.exp_avg_sqs), "expected tensors that share no memory"),
        (dict(weights=[given.weights[0], given.weights[0].view(-1)[:960].view(24, 40)]), "share no memory"),
        (dict(params=[make(2, 2, 2), given.params[1]]), "params: expected one or two dimensions"),
    ):
        with pytest.raises(ValueError, match=words):
            _C.masked_adamw_cpu(**(listed | wrong), **named, seed=None, step=1, threads=1)
    listed["weights"] = [make(40, 24), make(24, 40)]
    with pytest.raises(ValueError, match="weights: expected bfloat16 where a seed is given"):
        _C.masked_adamw_cpu(**listed, **named, seed=1, step=1, threads=1)
