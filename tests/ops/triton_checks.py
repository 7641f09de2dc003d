"""Numbers of the Triton kernels against fp64, on a GPU or in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/ops/triton_checks.py head_write_rows

runs the checks of one kernel interpreted (a process of its own, tests and tests/ops on PYTHONPATH); `test_triton.py`
runs the same ones on a device. Every tensor lies in a buffer of NaN, so a value read past its end shows in the result;
the result begins as NaN, and one written past its end shows in the buffer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from adamw_cases import SMALL
from adamw_cases import problem as adamw_problem
from cases import eager_gated_act, entry, make, oracle_gated_act
from tolerances import assert_within_rule

from pyarith import ops
from pyarith.ops._triton import head_write_rows, masked_adamw, shared_prefix_attention, slice_grad, vocab_logsumexp
from pyarith.ops.masked_adamw import _prepared

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import gate_up_candidate

FLOAT = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (torch.float32, torch.float64)  # what plain PyTorch and the oracle compute in
EDGE = 64
INTERPRETED = {
    "head_write_rows": head_write_rows.launch,
    "vocab_logsumexp": vocab_logsumexp.launch,
    "shared_prefix_attention": shared_prefix_attention.launch,
    "slice_grad": slice_grad.launch,
}


def placed(tensor: torch.Tensor | None, device: str) -> torch.Tensor | None:
    """A copy of the same strides in the middle of a buffer of NaN."""
    if tensor is None:
        return None
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    buffer = torch.full((extent + 2 * EDGE,), torch.nan, dtype=tensor.dtype, device=device)
    view = buffer.as_strided(tensor.shape, tensor.stride(), EDGE)
    once = tuple(slice(None if step else 1) for step in tensor.stride())  # what is repeated is written once
    view[once] = tensor[once]
    return view


def run(
    op: str,
    device: str,
    tensors: list[torch.Tensor | None],
    shape: tuple,
    dtype: torch.dtype,
    at: int,
    *scalars,
    start: torch.Tensor | None = None,
):
    """The kernel's result: ``tensors`` placed, the result inserted as argument ``at``; through the registry on a GPU.

    The result begins as ``start``, or as NaN. On a GPU it runs twice, the second time on another stream, with bitwise
    the same result.
    """
    place = [placed(t, device) if t is None or t.is_floating_point() else t.to(device) for t in tensors]
    results = []
    for stream in (None,) if device == "cpu" else (None, torch.cuda.Stream()):
        out = placed(torch.full(shape, torch.nan, dtype=dtype) if start is None else start, device)
        arguments = (*place[:at], out, *place[at:], *scalars)
        if device == "cpu":
            INTERPRETED[op](*arguments)
        else:
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                entry(op)(*arguments, backend="triton")
            torch.cuda.synchronize()
        buffer = out.as_strided((out.untyped_storage().nbytes() // dtype.itemsize,), (1,), 0)
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside.as_strided(out.shape, out.stride(), EDGE).fill_(False)
        assert buffer[outside].isnan().all(), f"{op}: wrote outside its result"
        results.append(out.cpu())
    bits = [result.view(torch.int16 if dtype.itemsize == 2 else torch.int32) for result in results]
    assert torch.equal(bits[0], bits[-1]), f"{op}: two runs differ"
    return results[0]


def check_head_write_rows(device: str) -> Iterator[str]:
    shapes = [(1, 1, 1, 1), (3, 2, 7, 17), (19, 3, 80, 150), (33, 2, 96, 40), (70, 1, 64, 257)]
    shapes += [(64, 32, 128, 4096), (200, 20, 80, 2560)] if device != "cpu" else []
    for (batch, head, d_head, d_model), dtype, layout in product(shapes, FLOAT, ("linear", "conv1d")):
        yield f"{batch} {head} {d_head} {d_model} {dtype} {layout}"
        stored = make(d_model, head * d_head, dtype=dtype)
        stored = stored.T if layout == "linear" else stored.T.contiguous()
        w_o = stored.view(head, d_head, d_model)
        # values of very different size: what the smaller parts of a split hold must count
        dz = make(head, batch, d_head).transpose(0, 1) * torch.logspace(-3, 3, d_head)
        base = make(batch, d_model, dtype=dtype) if layout == "linear" else None
        wide = dz.double().transpose(0, 1) @ w_o.double()
        plain = dz.transpose(0, 1) @ w_o.float()
        out = run("head_write_rows", device, [dz, w_o, base], (head, batch, d_model), torch.float32, 3)
        added = 0 if base is None else base
        assert_within_rule(out, plain + added, wide + added)
    yield "16-bit dz, strided base"
    dz, w_o, base = make(5, 2, 16, dtype=torch.float16), make(2, 16, 9), make(9, 5, dtype=torch.bfloat16).T
    out = run("head_write_rows", device, [dz, w_o, base], (2, 5, 9), torch.float32, 3)
    wide = [(dz.to(d).transpose(0, 1) @ w_o.to(d)) + base for d in PLAIN]
    assert_within_rule(out, *wide)
    yield "d_head 0"
    out = run("head_write_rows", device, [dz[..., :0], w_o[:, :0], base], (2, 5, 9), torch.float32, 3)
    assert torch.equal(out, base.float().expand(2, 5, 9))


def plain_logsumexp(dtype, normed, unembed, bias, scale, softcap):
    logits = scale * (normed.to(dtype) @ unembed.to(dtype).T)
    logits = logits if bias is None else logits + bias.to(dtype)
    return (softcap * torch.tanh(logits / softcap) if softcap else logits).logsumexp(-1)


def check_vocab_logsumexp(device: str) -> Iterator[str]:
    shapes = [(1, 1, 1), (5, 101, 17), (40, 300, 70), (150, 300, 32)]
    shapes += [(512, 50257, 768), (2000, 4096, 2048)] if device != "cpu" else []
    for (rows, d_vocab, d_model), dtype, softcap in product(shapes, FLOAT, (0.0, 5.0)):
        yield f"{rows} {d_vocab} {d_model} {dtype} softcap {softcap}"
        normed, unembed = make(rows, d_model, dtype=dtype), make(d_model, d_vocab, dtype=dtype)
        unembed = unembed.T if softcap else unembed.T.contiguous()
        bias = make(d_vocab, dtype=dtype) if softcap else None
        out = run("vocab_logsumexp", device, [normed, unembed, bias], (rows,), torch.float32, 3, 0.25, softcap)
        plain = [plain_logsumexp(d, normed, unembed, bias, 0.25, softcap) for d in PLAIN]
        assert_within_rule(out, *plain)
    yield "splits of several tiles"
    normed, unembed, programs = make(300, 32), make(1100, 32), vocab_logsumexp._PROGRAMS
    plain = [plain_logsumexp(d, normed, unembed, None, 1.0, 0.0) for d in PLAIN]
    try:
        for vocab_logsumexp._PROGRAMS in (1, 30):
            out = run("vocab_logsumexp", device, [normed, unembed, None], (300,), torch.float32, 3, 1.0, 0.0)
            assert_within_rule(out, *plain)
    finally:
        vocab_logsumexp._PROGRAMS = programs
    yield "two dtypes, strided rows"
    normed, unembed = make(34, 50, dtype=torch.bfloat16)[::2], make(99, 50)
    out = run("vocab_logsumexp", device, [normed, unembed, None], (17,), torch.float32, 3, 1.0, 0.0)
    assert_within_rule(out, *[plain_logsumexp(d, normed, unembed, None, 1.0, 0.0) for d in PLAIN])
    yield "softcap near 0"  # where 1 - exp would cancel
    normed, unembed = make(3, 4) * 1e-3, make(1, 4)
    out = run("vocab_logsumexp", device, [normed, unembed, None], (3,), torch.float32, 3, 1.0, 30.0)
    assert_within_rule(out, *[plain_logsumexp(d, normed, unembed, None, 1.0, 30.0) for d in PLAIN])
    yield "infinite and NaN logits"
    unembed, bias = torch.ones(300, 4), torch.full((300,), -torch.inf)
    for value in (-torch.inf, torch.inf, torch.nan, 1000.0):
        bias[290] = value
        out = run("vocab_logsumexp", device, [torch.ones(2, 4), unembed, bias], (2,), torch.float32, 3, 1.0, 0.0)
        expected = plain_logsumexp(torch.float32, torch.ones(2, 4), unembed, bias, 1.0, 0.0)
        assert torch.equal(out, expected) or (out.isnan().all() and expected.isnan().all()), (value, out, expected)


def literal_attention(q, k, v, k_own, v_own, lengths, scale, softcap, window):
    """In fp64, one row after the other over its own list of keys; shares no code with the reference."""
    out = torch.empty(q.shape, dtype=torch.float64)
    group = q.shape[2] // k.shape[2]
    for variant, batch, head in product(*map(range, q.shape[:3])):
        own, end = head // group, int(lengths[batch])
        first = max(0, end + 1 - window) if window else 0
        keys = torch.cat([k[batch, first:end, own], k_own[variant, batch, own][None]]).double()
        values = torch.cat([v[batch, first:end, own], v_own[variant, batch, own][None]]).double()
        scores = scale * (keys @ q[variant, batch, head].double())
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        out[variant, batch, head] = scores.softmax(0) @ values
    return out


def attention_inputs(variants, batch, heads, kv_heads, d_head, pos, dtype, lengths):
    """k as the view of a cache [batch, kv_head, pos, d_head]; what lies past a length is NaN."""
    q, k_own = make(variants, batch, heads, d_head, dtype=dtype), make(variants, batch, kv_heads, d_head, dtype=dtype)
    k = make(batch, kv_heads, pos, d_head, dtype=dtype).transpose(1, 2)
    v, v_own = make(batch, pos, kv_heads, d_head, dtype=dtype, seed=1), make(*k_own.shape, dtype=dtype, seed=1)
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = torch.nan
    return [q, k, v, k_own, v_own, torch.tensor(lengths)]


def check_shared_prefix_attention(device: str) -> Iterator[str]:
    shapes = [(1, 1, 1, 1, 1, 1, [1]), (3, 3, 4, 2, 16, 70, [70, 0, 33]), (7, 2, 6, 2, 80, 40, [39, 1])]
    shapes += [(45, 1, 3, 1, 96, 65, [64]), (2, 1, 8, 2, 256, 33, [32])]
    shapes += (
        [(256, 4, 16, 4, 128, 300, [300, 0, 255, 64]), (96, 2, 8, 8, 64, 129, [129, 1])] if device != "cpu" else []
    )
    for shape, dtype, (softcap, window) in product(shapes, FLOAT, ((0.0, 0), (0.0, 1), (5.0, 20), (0.0, 1000))):
        yield f"{shape} {dtype} softcap {softcap} window {window}"
        *sizes, lengths = shape
        tensors, scale = attention_inputs(*sizes, dtype, lengths), sizes[4] ** -0.5
        out = run("shared_prefix_attention", device, tensors, tensors[0].shape, dtype, 6, scale, softcap, window)
        # the yardstick multiplies matrices, as the kernel does: a row at a time PyTorch adds up in another order
        options = dict(scale=scale, softcap=softcap, window=window)
        plain = ops.shared_prefix_attention(*tensors, **options, backend="reference")
        assert_within_rule(out, plain, literal_attention(*tensors, **options))


def full_gradients(left, right, bounds):
    """In fp32 and fp64: the gradient of the whole weight, of which rows and columns are then taken."""
    for dtype in PLAIN:
        full = left.to(dtype).T @ right.to(dtype)
        for dim, some in enumerate(bounds):
            if some is not None:
                kept = [i for a, b in zip(some[::2], some[1::2], strict=True) for i in range(a, b)]
                full = full.index_select(dim, torch.tensor(kept, dtype=torch.int64))
        yield full


def check_slice_grad(device: str) -> Iterator[str]:
    heads, ragged = [16, 32, 48, 64, 64, 96], [1, 2, 5, 40, 40, 41, 50, 70]
    shapes = [(1, 1, 1, None, None), (70, 33, 17, None, None), (40, 70, 45, ragged, None), (33, 45, 70, None, ragged)]
    shapes += [
        (65, 96, 130, heads, [0, 130]),
        (20, 96, 70, heads, ragged),
        (9, 20, 30, [], None),
        (0, 20, 30, [2, 3], None),
    ]
    blocks = [bound for head in (1, 5, 6, 20, 31) for bound in (128 * head, 128 * head + 128)]
    large = [(4096, 4096, 4096, blocks, None), (5000, 4096, 2560, [1, 130, 256, 400], blocks[:4])]
    shapes += large if device != "cpu" else []
    for (tokens, m, n, *bounds), dtype, accumulate in product(shapes, FLOAT, (False, True)):
        yield f"{tokens} {m} {n} {bounds} {dtype} {accumulate}"
        left, right = make(tokens, m, dtype=dtype), make(tokens, n, dtype=dtype, seed=1)
        plain, wide = full_gradients(left, right, bounds)
        start = make(*plain.shape) if accumulate else None
        out = run("slice_grad", device, [left, right], plain.shape, torch.float32, 2, *bounds, accumulate, start=start)
        added = start if accumulate else 0
        assert_within_rule(out, plain + added, wide + added)
    yield "splits of the tokens"
    limits = slice_grad._PROGRAMS, slice_grad._SPLIT_TOKENS
    left, right, start = make(300, 50), make(300, 40), make(50, 40)
    plain, wide = full_gradients(left, right, (None, None))
    try:
        for slice_grad._PROGRAMS, slice_grad._SPLIT_TOKENS, accumulate in product((4, 7, 100), (1, 90), (False, True)):
            out = run("slice_grad", device, [left, right], plain.shape, torch.float32, 2, None, None, accumulate,
                      start=start if accumulate else None)  # fmt: skip
            added = start if accumulate else 0
            assert_within_rule(out, plain + added, wide + added)
    finally:
        slice_grad._PROGRAMS, slice_grad._SPLIT_TOKENS = limits
    yield "strided inputs and result"
    both, start = make(40, 130, dtype=torch.bfloat16), make(7, 60)[:, 3:-9]
    for left, right in (
        (both[:, :70], both[:, 70:118]),
        (make(70, 40).T, make(48, 40).T),
        (make(70).expand(40, 70),) * 2,
    ):
        right = right[:, :48]
        plain, wide = full_gradients(left, right, ([3, 6, 60, 64], None))
        out = run("slice_grad", device, [left, right], None, torch.float32, 2, [3, 6, 60, 64], None, True, start=start)
        assert_within_rule(out, plain + start, wide + start)
    yield "what the table promises to the compiler"
    for bounds in (heads, ragged, [8, 24, 40, 64], [16, 30, 32, 48], [0, 4, 16, 20]):
        step = slice_grad.plan(
            make(2, 96), make(2, 96), make(sum(bounds[1::2]) - sum(bounds[::2]), 96), bounds, None, False
        )
        table, granule = step[0].arguments["row_table"], step[0].arguments["ROW_GRANULE"]
        blocks = table.view(-1, granule)
        assert (blocks[:, 0] % granule == 0).all() and (blocks == blocks[:, :1] + torch.arange(granule)).all(), bounds


def check_gate_up_candidate(device: str) -> Iterator[str]:
    for act, (rows, d_model, d_mlp) in product(("silu", "gelu", "gelu_tanh", "relu"), ((5, 17, 33), (70, 96, 40))):
        yield f"{act} {rows} {d_model} {d_mlp}"
        dtype = torch.bfloat16
        x, gate, up = (make(*s, dtype=dtype) for s in ((rows, d_model), (d_mlp, d_model), (d_mlp, d_model)))
        biases = [make(d_mlp, dtype=dtype), make(d_mlp, dtype=dtype, seed=1)] if act == "silu" else [None, None]
        out = placed(torch.full((rows, d_mlp), torch.nan, dtype=dtype), device)
        gate_up_candidate.launch(*(placed(t, device) for t in (x, gate, up, *biases)), out, act)
        added = [0 if bias is None else bias for bias in biases]
        plain, wide = ([x.to(d) @ gate.to(d).T + added[0], x.to(d) @ up.to(d).T + added[1]] for d in PLAIN)
        assert_within_rule(out.cpu(), eager_gated_act(*plain, act).to(dtype), oracle_gated_act(*wide, act))


def check_masked_adamw(device: str) -> Iterator[str]:
    """The bits of the reference; weights are NaN before, and what is not written stays so."""
    nine = tuple((4 * i, 4 * i + 1) for i in range(9))
    cases = [*SMALL, ((10, 48), 1, (*nine, (37, 40))), ((80, 40), 0, tuple((8 * i, 8 * i + 4) for i in range(10)))]
    cases += [((4096, 4096), 1, ((128, 384), (1024, 1152)))] if device != "cpu" else []
    for dtype, seed, scale, beta1 in (
        (torch.float32, None, None, 0.9),
        (torch.bfloat16, None, torch.tensor([0.3]), 0.9),
        (torch.bfloat16, 2**40 + 3, None, 0.3),
        (torch.float16, None, torch.tensor([0.3]), 0.0),
    ):
        yield f"{dtype} seed {seed} beta1 {beta1}"
        given = adamw_problem(dtype, cases, seed=seed, beta1=beta1, grad_scale=scale)
        for weight in given.weights:
            weight.fill_(torch.nan)
        for stream in (None,) if device == "cpu" else (None, torch.cuda.Stream()):
            ours = given.copy(lambda tensor: placed(tensor, device))
            if device == "cpu":
                listed, named = _prepared(*ours.entry_arguments(3))
                masked_adamw.launch(*listed, **named)
            else:
                torch.cuda.synchronize()
                with torch.cuda.stream(stream):
                    ours.step(3, "triton")
                torch.cuda.synchronize()
            expected = given.copy()
            expected.step(3, "reference")
            for got, exact in zip(ours.changed(), expected.changed(), strict=True):
                assert torch.equal(got.cpu().view(torch.uint8), exact.view(torch.uint8)), tuple(got.shape)
                buffer = got.as_strided((got.numel() + 2 * EDGE,), (1,), 0)
                assert buffer[:EDGE].isnan().all() and buffer[-EDGE:].isnan().all(), "wrote outside its tensors"


CHECKS: dict[str, Callable[[str], Iterator[str]]] = {
    "head_write_rows": check_head_write_rows,
    "vocab_logsumexp": check_vocab_logsumexp,
    "shared_prefix_attention": check_shared_prefix_attention,
    "slice_grad": check_slice_grad,
    "gate_up_candidate": check_gate_up_candidate,
    "masked_adamw": check_masked_adamw,
}

if __name__ == "__main__":
    count = 0
    for case in CHECKS[sys.argv[1]]("cpu"):
        print(case, flush=True)  # the last line names the case that failed
        count += 1
    print("done:", count)
