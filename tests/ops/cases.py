"""Inputs and oracles of every op: used by the op's own tests and by the checks that run at each CPU level."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from pyarith import ops

SIZES = (1, 3, 17, 127)
NATIVE = (torch.float32, torch.bfloat16)
LEVELS = ("base", "avx2", "avx512")
Make = Callable[..., torch.Tensor]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def name_of(value: object) -> str:
    """Short parameter ids: bfloat16 instead of torch.bfloat16."""
    return str(value).removeprefix("torch.")


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element further into a fresh buffer: no vector access of it is aligned."""
    buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return buffer[1:].view(tensor.shape).copy_(tensor)


def oracle_add_norm(row, delta, write, weight, bias, eps, kind):
    """(row, out) in fp64, written apart from the library's reference."""
    x = row.double()
    for addend in (delta, write):
        x = x if addend is None else x + addend.double()
    weight, d_model = weight.double(), x.shape[-1]
    if kind == "layer":
        return x, F.layer_norm(x, (d_model,), weight, None if bias is None else bias.double(), eps)
    return x, F.rms_norm(x, (d_model,), weight + (1 if kind == "rms1p" else 0), eps)


def eager_add_norm(row, delta, write, weight, bias, eps, kind, out_dtype):
    """Plain PyTorch: fp32 rows and norm, cast at the end."""
    x = row.clone()
    for addend in (delta, write):
        x = x if addend is None else x + addend.float()
    weight, d_model = weight.float(), x.shape[-1]
    if kind == "layer":
        return F.layer_norm(x, (d_model,), weight, None if bias is None else bias.float(), eps).to(out_dtype)
    return F.rms_norm(x, (d_model,), weight + (1 if kind == "rms1p" else 0), eps).to(out_dtype)


def eager_gated_act(gate, up, act):
    """Plain PyTorch in the dtype of the inputs."""
    if act == "gelu_tanh":
        value = F.gelu(gate, approximate="tanh")
    else:
        value = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[act](gate)
    return value if up is None else value * up


def oracle_gated_act(gate, up, act):
    return eager_gated_act(gate.double(), None if up is None else up.double(), act)


def plain_answer_logits(dtype, row, write, weight, bias, eps, kind, targets, target_bias, scale, softcap):
    """Plain PyTorch with everything in one dtype: fp64 is the oracle, fp32 the yardstick."""
    cast = [None if t is None else t.to(dtype) for t in (row, write, weight, bias, targets, target_bias)]
    row, write, weight, bias, targets, target_bias = cast
    x, d_model = row if write is None else row + write, row.shape[-1]
    if kind == "layer":
        hidden = F.layer_norm(x, (d_model,), weight, bias, eps)
    else:
        hidden = F.rms_norm(x, (d_model,), weight + (1 if kind == "rms1p" else 0), eps)
    logits = scale * (hidden[:, :, None] * targets).sum(-1)
    logits = logits if target_bias is None else logits + target_bias
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def adamw_sample(dtype, grad_scale, seed):
    """Rows, columns and a part of a bias of weights of ``dtype``, at step 2."""
    params, grads, exp_avgs, roots = ([make(*s, seed=i) for s in ((3, 4), (4, 3), (3,))] for i in range(4))
    weights = [make(*s, dtype=dtype) for s in ((6, 4), (4, 6), (6,))]
    places = ([0, 1, 4, 6] * 3, [2, 2, 2], [0, 1, 0])
    numbers = (1e-3, 0.9, 0.999, 1e-8, 0.1, 2, seed)
    return (params, grads, exp_avgs, [root.square() for root in roots], weights, *places, grad_scale, *numbers)


def mapped(arguments, change: Callable[[torch.Tensor], torch.Tensor]) -> list:
    """The arguments of a torch entry with ``change`` made to every tensor, those in lists too."""
    return [
        mapped(a, change) if isinstance(a, list) else change(a) if isinstance(a, torch.Tensor) else a for a in arguments
    ]


def tensors_in(arguments) -> list[torch.Tensor]:
    found = [tensors_in(a) if isinstance(a, list) else [a] for a in arguments]
    return [tensor for some in found for tensor in some if isinstance(tensor, torch.Tensor)]


def samples() -> dict[str, list[tuple]]:
    """Positional arguments of the torch entries, for opcheck and compilation: each op with and without its options."""
    row, write, weight, bias = make(3, 2, 17), make(2, 17), make(17), make(17, seed=1)
    gate, targets = make(5, 17), make(2, 4, 17)
    dz, w_o = make(2, 3, 4), make(17, 12).T.view(3, 4, 17)
    q, cache, own = make(3, 2, 4, 5), make(2, 2, 7, 5).transpose(1, 2), make(3, 2, 2, 5)
    lengths = torch.tensor([7, 0])
    ablate = torch.tensor([[True, False, True], [False, False, True]])
    return {
        "ablate_heads": [
            (make(2, 2, 4, 3, 8), ablate, make(2, 1, 3, 8), torch.empty(2, 2, 4, 3, 8)),
            (make(2, 4, 3, 5).expand(2, 2, 4, 3, 5), ablate, None, torch.empty(2, 2, 4, 3, 5)),
        ],
        "add_norm": [
            (row.clone(), make(3, 2, 17, seed=2), write, weight, None, torch.empty(3, 2, 17), 1e-5, "rms"),
            (row.clone(), None, None, weight, bias, torch.empty(3, 2, 17, dtype=torch.bfloat16), 1e-5, "layer"),
        ],
        "gated_act": [
            (gate, make(5, 17, seed=3), torch.empty(5, 17), "silu"),
            (gate, None, torch.empty(5, 17), "gelu"),
        ],
        "answer_logits": [
            (row, write, weight, None, targets, make(2, 4), torch.empty(3, 2, 4), 1e-5, "rms1p", 0.5, 30.0),
            (row, None, weight, bias, targets, None, torch.empty(3, 2, 4), 1e-5, "layer", 1.0, 0.0),
        ],
        "vocab_logsumexp": [
            (make(5, 17), make(101, 17), make(101), torch.empty(5), 0.5, 20.0),
            (make(5, 17), make(101, 17), None, torch.empty(5), 1.0, 0.0),
        ],
        "shared_prefix_attention": [
            (q, cache, make(2, 7, 2, 5), own, make(3, 2, 2, 5, seed=1), lengths, torch.empty(3, 2, 4, 5), 0.5, 20.0, 3),
            (q, cache, make(2, 7, 2, 5), own, make(3, 2, 2, 5, seed=1), lengths, torch.empty(3, 2, 4, 5), 0.5, 0.0, 0),
        ],
        "masked_adamw": [
            adamw_sample(torch.float32, None, None),
            adamw_sample(torch.bfloat16, torch.tensor([0.5]), 7),
        ],
        "slice_grad": [
            (make(9, 17), make(9, 12), torch.empty(7, 12), [0, 3, 5, 9], None, False),
            (make(18, 17)[::2], make(9, 12), make(17, 10), None, [0, 4, 4, 10], True),
        ],
        "head_write_rows": [
            (dz, w_o, make(2, 17), torch.empty(3, 2, 17)),
            (dz, w_o, None, torch.empty(3, 2, 17)),
        ],
    }


def entry(op: str):
    return getattr(torch.ops.pyarith, op).default


assert set(samples()) == {row.op for row in ops.report()}, "an op without samples would go unchecked"
