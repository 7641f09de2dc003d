"""CUDA kernels run on the stream and the device that torch names, and can be captured into a graph."""

from __future__ import annotations

import pytest
import torch
from cases import entry, mapped, needs_cuda, samples, tensors_in

CASES = [
    (op, i)
    for op, calls in samples().items()
    if op in ("ablate_heads", "add_norm", "answer_logits", "gated_act", "masked_adamw")
    for i in range(len(calls))
]
pytestmark = [needs_cuda, pytest.mark.parametrize("op, i", CASES)]


def call(op, i, device="cuda"):
    """Run the sample on ``device``; returns its tensors afterwards, results among them."""
    args = mapped(samples()[op][i], lambda a: a.to(device))
    entry(op)(*args, backend="cuda")
    return tensors_in(args)


def assert_same(got, expected):
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))


def test_another_stream(op, i):
    expected = call(op, i)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # the copies of the inputs wait behind this: a kernel on another stream reads garbage
        given = mapped(samples()[op][i], torch.Tensor.pin_memory)
        args = mapped(given, lambda a: a.to("cuda", non_blocking=True))
        entry(op)(*args, backend="cuda")
    stream.synchronize()
    assert_same(tensors_in(args), expected)


def test_graph(op, i):
    expected = call(op, i)
    given = mapped(samples()[op][i], torch.Tensor.cuda)
    args = mapped(given, torch.Tensor.clone)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        entry(op)(*args, backend="cuda")
    for _ in range(2):
        for arg, start in zip(tensors_in(args), tensors_in(given), strict=True):
            arg.copy_(start)
        graph.replay()
        assert_same(tensors_in(args), expected)


def test_every_device(op, i):
    expected = call(op, i, "cuda:0")
    for number in range(1, torch.cuda.device_count()):
        assert_same(call(op, i, f"cuda:{number}"), expected)
        assert torch.cuda.current_device() == 0
