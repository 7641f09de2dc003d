"""masked_adamw: by hand, against torch.optim.AdamW, the same bits on every backend, rounding at random, refusals."""

import math
import os
from dataclasses import replace

import pytest
import torch
from adamw_cases import NUMBERS, SMALL, Problem, by_torch, problem, views
from cases import misaligned, name_of, needs_cuda
from tolerances import FLOOR, assert_within_rule, error

from pyarith import ops
from pyarith.errors import InputError
from pyarith.ops._random import noise

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BACKENDS = ("cpu", "reference", *(pytest.param(name, marks=needs_cuda) for name in ("cuda", "triton")))
# more than streams past the caches, rows of which a line of the cache holds no whole number
LARGE = (((300, 515), 0, ((1, 150), (151, 299))), ((801, 331), 1, ((3, 70), (100, 331))), ((5000,), 0, ((7, 4999),)))
SCALED = dict(grad_scale=torch.tensor([0.3]))


def on(backend: str, given: Problem) -> Problem:
    """A copy where ``backend`` runs."""
    return given.copy(torch.Tensor.cuda if backend in ("cuda", "triton") else torch.Tensor.clone)


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(x.cpu().contiguous().view(torch.uint8).equal(y.cpu().contiguous().view(torch.uint8)) for x, y in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    # g = 2 / 2, m = 0 + 0.5, v = 0.25 * 4 + 0.75 = 1.75, over 1 - 0.25^2: 28 / 15; step 0.25 / (1 - 0.5^2) = 1 / 3
    given = Problem(
        *([torch.full((1,), x)] for x in (3.0, 2.0, 0.0, 4.0)),
        weights=[torch.tensor([7.0, 8.0, 9.0])],
        ranges=[((1, 2),)],
        dims=[0],
        numbers=dict(lr=0.25, beta1=0.5, beta2=0.25, eps=0.5, weight_decay=0.4, grad_scale=torch.tensor(0.5)),
    )
    given = on(backend, given)
    given.step(2, backend)
    p = 3 * (1 - 0.25 * 0.4) - 0.5 / 3 / (math.sqrt(28 / 15) + 0.5)
    assert given.exp_avgs[0].item() == 0.5 and given.exp_avg_sqs[0].item() == 1.75
    assert given.params[0].item() == pytest.approx(p, rel=1e-6)
    assert given.weights[0].tolist() == [7, given.params[0].item(), 9]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype, numbers",
    (
        *(
            (dtype, numbers)
            for dtype in (F32, F64)
            for numbers in ({}, SCALED, dict(weight_decay=0.0, beta1=0.0, eps=0.1))
        ),
        (BF16, SCALED),
    ),
    ids=str,
)
def test_20_steps_against_torch(backend, dtype, numbers):
    if dtype is F64 and backend != "reference":
        pytest.skip("fp64 slices run on the reference")
    start = problem(dtype, **numbers)
    for moment in (*start.exp_avgs, *start.exp_avg_sqs):
        moment.zero_()
    steps = range(1, 21)
    oracle, eager = by_torch(start, F64, steps), by_torch(start, start.params[0].dtype, steps)
    given = on(backend, start)
    for step in steps:
        given.draw_grads(step)
        given.step(step, backend)
    compact = [*given.params, *given.exp_avgs, *given.exp_avg_sqs]
    for i, (got, plain, exact) in enumerate(zip(compact, eager, oracle, strict=True)):
        if dtype is F64:  # plain PyTorch is the oracle itself
            assert error(got.cpu(), exact) <= len(steps) * FLOOR[F64], i
        else:
            assert_within_rule(got.cpu(), plain, exact, str(i))
    for weight, param, dim, ranges in zip(given.weights, given.params, given.dims, given.ranges, strict=True):
        assert torch.equal(torch.cat(views(weight, dim, ranges), dim), param.to(dtype))


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=name_of)
@pytest.mark.parametrize("cases", (SMALL, LARGE), ids=("small", "large"))
@pytest.mark.parametrize("seeded", (False, True), ids=("nearest", "stochastic"))
def test_same_bits_on_every_backend(dtype, cases, seeded):
    if seeded and dtype is not BF16:
        pytest.skip("only bf16 is rounded stochastically")
    numbers = SCALED | (dict(seed=2**40 + 3) if seeded else {})
    start = problem(dtype, cases, beta1=0.3 if dtype is F16 else 0.9, **numbers)
    start.grads[0].view(-1)[0] = 1e-30  # whose square is below the smallest fp32 number
    start.grads[-1].view(-1)[-1] = 1e19  # whose square is beyond the largest
    expected = start.copy()
    expected.step(3, "reference")
    devices = ("cpu",) if not torch.cuda.is_available() else ("cpu", "cuda", "triton")
    for backend in devices:
        for place in (torch.Tensor.clone, misaligned):
            given = on(backend, start).copy(place)
            given.step(3, backend)
            assert same_bits(given.changed(), expected.changed()), (backend, place)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", (None, 5), ids=("nearest", "stochastic"))
def test_the_rest_of_the_weight_keeps_its_bits(backend, seed):
    for dtype in (BF16,) if seed else (F32, BF16, F16):
        given = on(backend, problem(dtype, (*SMALL, *LARGE), seed=seed))
        for weight in given.weights:  # any bits, those of NaN with a payload too
            whole = weight.view(torch.int32 if dtype is F32 else torch.int16)
            whole.random_(-(2**15), 2**15)
        before = [weight.clone() for weight in given.weights]
        given.step(1, backend)
        for new, old, param, dim, ranges in zip(
            given.weights, before, given.params, given.dims, given.ranges, strict=True
        ):
            if seed is None:
                assert torch.equal(torch.cat(views(new, dim, ranges), dim), param.to(dtype))
            for into, out_of in zip(views(new, dim, ranges), views(old, dim, ranges), strict=True):
                into.copy_(out_of)
        integers = torch.int32 if dtype is F32 else torch.int16
        assert same_bits([w.view(integers) for w in given.weights], [w.view(integers) for w in before])


def test_any_number_of_threads_gives_the_same_bits():
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            given = problem(BF16, LARGE, seed=9)
            given.step(4, "cpu")
            results.append(given.changed())
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_strides(backend):
    given = on(backend, problem(F32))
    expected = given.copy()
    given.grads = [grad.t().contiguous().t() if grad.dim() == 2 else grad for grad in given.grads]
    given.grads[4] = expected.grads[4][:1].expand(255)  # what the gradient of a sum is
    expected.grads[4] = given.grads[4].clone()
    for one in (given, expected):
        one.step(1, backend)
    assert same_bits(given.changed(), expected.changed())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_where_it_is(backend):
    for dtype, seed in ((F32, None), (BF16, None), (BF16, 3), (F16, None)):
        clean = on(backend, problem(dtype, SMALL[:1], seed=seed))
        given = clean.copy()
        given.grads[0][3, 5] = math.nan
        for one in (clean, given):
            one.step(1, backend)
        for got, expected in zip(given.changed(), clean.changed(), strict=True):
            at = (3, 5) if got.shape == given.params[0].shape else (11, 5)  # ranges ((8, 24),)
            assert got[at].isnan() and got.isnan().sum() == 1
            got[at] = expected[at]
            assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_nothing_to_do(backend):
    cases = (((0, 4), 0, ()), ((4, 0), 1, ()), ((3, 0), 0, ((0, 2),)), ((2, 2), 0, ((0, 1),)))
    given = problem(F32, cases[2:])
    given.step(1, backend)
    weight = torch.ones(4, 4)
    empty = [torch.empty(0, 4) for _ in range(4)]
    numbers = {**NUMBERS, "step": 1, "backend": backend}
    ops.masked_adamw(*([tensor] for tensor in empty), [weight], [()], [0], **numbers)
    assert torch.equal(weight, torch.ones(4, 4))


def test_autograd_notices_every_change():
    given = problem(F32, SMALL[:2])
    before = [tensor._version for tensor in given.changed()]
    given.step(1, "cpu")
    assert all(tensor._version > old for tensor, old in zip(given.changed(), before, strict=True))
    assert all(grad._version == 0 for grad in given.grads)


def test_leaves_that_need_gradients_are_changed_without_grad_mode():
    given = problem(F32, SMALL[:1])
    given.params[0].requires_grad_()
    with pytest.raises(InputError, match=r"masked_adamw has no gradient.*torch\.no_grad"):
        given.step(1, "cpu")
    with torch.no_grad():
        given.step(1, "cpu")


def test_the_wrapper_compiles():
    torch._dynamo.reset()
    given = problem(BF16, SMALL[:3], seed=4, **SCALED)
    expected = given.copy()
    expected.step(2, "auto")

    def step(params, grads, exp_avgs, exp_avg_sqs, weights):
        lists = (params, grads, exp_avgs, exp_avg_sqs, weights)
        numbers = {**NUMBERS, **given.numbers, "step": 2}
        ops.masked_adamw(*lists, given.ranges, given.dims, **numbers)

    lists = (given.params, given.grads, given.exp_avgs, given.exp_avg_sqs, given.weights)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*lists)
    assert same_bits(given.changed(), expected.changed())


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_32_bits(backend):
    rows, columns = 3, 2**30 + 8  # 6 GiB of which two pages a row are touched
    free = torch.cuda.mem_get_info()[0] if backend in ("cuda", "triton") else os.sysconf("SC_PHYS_PAGES") * 4096
    if free < 7 * 2**30:
        pytest.skip("needs 7 GiB")
    ranges = ((0, 3), (columns - 5, columns))
    small = problem(BF16, (((rows, 8), 1, ((0, 8),)),))
    given = replace(on(backend, small), ranges=[ranges])
    given.weights = [torch.empty(rows, columns, dtype=BF16, device=given.params[0].device)]
    given.step(1, backend)
    small.step(1, "reference")
    assert same_bits([torch.cat(views(given.weights[0], 1, ranges), 1)], small.weights)


def test_philox():
    # known answers of Random123: counter and key of zeros; the generator takes (group, group / 2^32, step, slice)
    halves = noise(0, 0, 0, 8, torch.device("cpu")).tolist()
    words = [low | high << 16 for low, high in zip(halves[::2], halves[1::2], strict=True)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    long = noise(3, 5, 7, 1000, torch.device("cpu"))
    assert torch.equal(noise(3, 5, 7, 13, torch.device("cpu")), long[:13])
    for other in ((4, 5, 7), (3 + 2**32, 5, 7), (3, 6, 7), (3, 5, 8)):
        assert (noise(*other, 1000, torch.device("cpu")) == long).sum() < 5


def rounded(backend, masters, repeats, seed=11):
    """What masters become in bf16, [repeats, masters]: each row of the weight from the same fp32 values."""
    given = problem(BF16, (((repeats, len(masters)), 0, ((0, repeats),)),), seed=seed, lr=0.0)
    given.params[0].copy_(masters.expand(repeats, -1))
    given = on(backend, given)
    given.step(1, backend)
    assert torch.equal(given.params[0].cpu(), masters.expand(repeats, -1))  # the master keeps every bit
    return given.weights[0].cpu()


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_is_right_on_average(backend):
    repeats = 20000
    shares = torch.tensor([0.0, 1 / 65536, 0.01, 0.25, 0.5, 0.75, 0.99, 65535 / 65536])
    for low in (1.0, -1.0, 1.25 * 2.0**100, -(2.0**-120), 2.0**-130):
        steps = (shares * 65536).to(torch.int32) + torch.tensor(low).view(torch.int32)
        masters = steps.view(F32)
        found = rounded(backend, masters, repeats)
        above = torch.tensor(low).view(torch.int32).add(65536).view(F32)
        up = found == above.to(BF16)
        assert (up | (found == torch.tensor(low).to(BF16))).all()  # one of the two neighbours
        deviation = (shares * (1 - shares) / repeats).sqrt()
        assert ((up.double().mean(0) - shares).abs() <= 5 * deviation + 1e-12).all(), (low, up.double().mean(0))
    # independent of each other: neighbours in a row and in a column agree as often as chance has it
    up = rounded(backend, torch.full((8,), 1 + 2.0**-8), repeats) > 1
    for a, b in ((up[:, 1:], up[:, :-1]), (up[1:], up[:-1])):
        assert abs((a == b).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(a.numel())


def test_stochastic_rounding_of_the_extremes():
    largest = torch.finfo(BF16).max
    masters = torch.tensor([0.0, 1.5, largest, -largest, 2.0**-133, 3.394e38])
    found = rounded("cpu", masters, 50)
    assert same_bits([found[:, :5]], [masters[:5].to(BF16).expand(50, -1)])
    assert set(found[:, 5].tolist()) == {largest, math.inf}


def test_stochastic_rounding_keeps_small_updates():
    # steps of lr 1e-4 on a weight of 1: to nearest, bf16 does not move; at random it follows the master on average
    shape = ((64, 64), 0, ((0, 64),))
    ends = {}
    for seed in (None, 1):
        given = problem(BF16, (shape,), seed=seed, lr=1e-4, weight_decay=0.0)
        given.params[0].fill_(1.0), given.weights[0].fill_(1.0)
        for moment in (*given.exp_avgs, *given.exp_avg_sqs):
            moment.zero_()
        given.grads[0].fill_(-1.0)
        for step in range(1, 11):
            given.step(step, "cpu")
        ends[seed] = given.weights[0].double().mean().item()
    assert ends[None] == 1.0 and ends[1] == pytest.approx(1.001, abs=3e-4)


def test_steps_down_to_the_reference_in_fp64():
    assert ops.backend_of("masked_adamw", "cpu", F64) == "reference"
    start = problem(F64)
    given = start.copy()
    given.draw_grads(1)
    given.step(1, "auto")
    exact = by_torch(start, F64, [1])
    assert all(error(got, oracle) <= FLOOR[F64] for got, oracle in zip(given.changed(), exact, strict=False))
