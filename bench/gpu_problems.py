"""One problem per op: random inputs on any device, the op, plain PyTorch, and the fp64 oracle of tests/ops/cases.py.

All of them read and write a mapping from argument name to tensor, so that the same problem can be run from fresh
copies, at misaligned addresses, in a captured graph, or again and again under a clock.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from cases import eager_gated_act, oracle_add_norm, oracle_gated_act, plain_answer_logits

from pyarith import ops

Tensor = torch.Tensor
Arguments = dict[str, Tensor | None]
Ranges = tuple[tuple[int, int], ...] | None
EPS = 1e-5


class Draw:
    """Standard normal tensors on one device."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.device = generator, generator.device

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self.generator, device=self.device)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Problem:
    """`run(arguments, backend)` and `eager(arguments)` leave their results in the arguments named `results`.

    `outs` are arguments that are only written; `moved` are the bytes of a problem that touches only parts of some;
    `rivals` are other ways to compute the same, with the error they may have (None: the rule of the kernels).
    """

    shape: Mapping[str, object]
    arguments: Arguments
    run: Callable[[Arguments, str], object]
    eager: Callable[[Arguments], object]
    oracle: Callable[[Arguments], tuple[Tensor, ...]]
    results: tuple[str, ...] = ("out",)
    outs: tuple[str, ...] = ("out",)
    flop: float | None = None
    moved: int | None = None
    rivals: Mapping[str, tuple[Callable[[Arguments], object], float | None]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Each input read once, each result written once."""
        if self.moved is not None:
            return self.moved
        read = [t.nbytes for name, t in self.arguments.items() if t is not None and name not in self.outs]
        return sum(read) + sum(self.arguments[name].nbytes for name in self.results)  # type: ignore[union-attr]

    def fresh(self, offset: int = 0) -> Arguments:
        """Copies of the same strides, `offset` elements into their buffers; outs hold NaN."""
        return {
            name: None if t is None else placed(t, offset, poison=name in self.outs)
            for name, t in self.arguments.items()
        }

    def results_of(self, call: Callable[[Arguments], object], offset: int = 0) -> list[Tensor]:
        arguments = self.fresh(offset)
        call(arguments)
        return [arguments[name] for name in self.results]  # type: ignore[misc]


def placed(tensor: Tensor, offset: int, poison: bool = False) -> Tensor:
    """The same values and strides `offset` elements into a fresh buffer, whose gaps hold NaN; or NaN alone."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    blank = torch.nan if tensor.is_floating_point() else 0
    view = tensor.new_full((size + offset,), blank).as_strided(tensor.shape, tensor.stride(), offset)
    return view if poison else fill(view, tensor)


def fill(target: Tensor, source: Tensor) -> Tensor:
    """Copy values between tensors of the same strides; what an expanded dimension repeats is copied once."""
    once = tuple(slice(1 if stride == 0 else None) for stride in source.stride())
    target[once].copy_(source[once])
    return target


def add_norm(
    draw: Draw, dtype: torch.dtype, variant: int, batch: int, d_model: int, kind: str = "rms", addends: bool = True
) -> Problem:
    shape = (variant, batch, d_model)

    def eager(t: Arguments) -> None:
        row, weight = t["row"], t["weight"].float()
        if addends:
            row.add_(t["delta"]).add_(t["write"])
        if kind == "layer":
            out = F.layer_norm(row, (d_model,), weight, t["bias"].float(), EPS)
        else:
            out = F.rms_norm(row, (d_model,), weight + 1 if kind == "rms1p" else weight, EPS)
        t["out"] = out.to(dtype)

    return Problem(
        {"variant": variant, "batch": batch, "d_model": d_model, "kind": kind},
        {
            "row": draw(*shape),
            "delta": draw(*shape, dtype=dtype) if addends else None,
            "write": draw(batch, d_model) if addends else None,
            "weight": draw(d_model, dtype=dtype),
            "bias": draw(d_model, dtype=dtype) if kind == "layer" else None,
            "out": draw.empty(*shape, dtype=dtype),
        },
        lambda t, backend: ops.add_norm(**t, eps=EPS, kind=kind, backend=backend),
        eager,
        lambda t: oracle_add_norm(t["row"], t["delta"], t["write"], t["weight"], t["bias"], EPS, kind)[::-1],
        results=("out", "row"),
    )


def gated_act(
    draw: Draw,
    dtype: torch.dtype,
    rows: int,
    d_mlp: int,
    act: str = "silu",
    gated: bool = True,
    halves: bool = False,
    in_place: bool = False,
) -> Problem:
    """`halves`: gate and up are the two halves of one tensor's rows, as a fused projection leaves them."""
    both = draw(rows, 2 * d_mlp, dtype=dtype)
    gate, up = both.chunk(2, -1) if halves else (draw(rows, d_mlp, dtype=dtype), draw(rows, d_mlp, dtype=dtype))
    arguments: Arguments = {"gate": gate, "up": up if gated else None}
    result = "gate" if in_place else "out"
    if not in_place:
        arguments["out"] = draw.empty(rows, d_mlp, dtype=dtype)

    def eager(t: Arguments) -> None:
        t[result] = eager_gated_act(t["gate"], t["up"], act)

    return Problem(
        {"rows": rows, "d_mlp": d_mlp, "act": act},
        arguments,
        lambda t, backend: ops.gated_act(t["gate"], t["up"], act, out=t[result], backend=backend),
        eager,
        lambda t: (oracle_gated_act(t["gate"], t["up"], act),),
        results=(result,),
        outs=() if in_place else ("out",),
    )


def answer_logits(
    draw: Draw,
    dtype: torch.dtype,
    variant: int,
    batch: int,
    k: int,
    d_model: int,
    kind: str = "rms",
    scale: float = 1.0,
    softcap: float = 0.0,
    extras: bool = True,
) -> Problem:
    def plain(t: Arguments, like: torch.dtype) -> Tensor:
        norm = (t["row"], t["write"], t["weight"], t["bias"], EPS, kind)
        return plain_answer_logits(like, *norm, t["target_rows"], t["target_bias"], scale, softcap)

    def eager(t: Arguments) -> None:
        t["out"] = plain(t, torch.float32)

    return Problem(
        {"variant": variant, "batch": batch, "k": k, "d_model": d_model, "kind": kind},
        {
            "row": draw(variant, batch, d_model),
            "write": draw(batch, d_model) if extras else None,
            "weight": draw(d_model, dtype=dtype),
            "bias": draw(d_model, dtype=dtype) if kind == "layer" else None,
            "target_rows": draw(batch, k, d_model, dtype=dtype),
            "target_bias": draw(batch, k, dtype=dtype) if extras else None,
            "out": draw.empty(variant, batch, k),
        },
        lambda t, backend: ops.answer_logits(**t, eps=EPS, kind=kind, scale=scale, softcap=softcap, backend=backend),
        eager,
        lambda t: (plain(t, torch.float64),),
    )


def head_write_rows(
    draw: Draw, dtype: torch.dtype, batch: int, head: int, d_head: int, d_model: int, base: bool = True,
    linear: bool = True,
) -> Problem:  # fmt: skip
    """`linear`: w_o is a view of an nn.Linear's weight, otherwise of a Conv1D's. dz and base: fp32, as in a replay."""
    if linear:
        w_o = draw(d_model, head * d_head, dtype=dtype).T.view(head, d_head, d_model)
    else:
        w_o = draw(head, d_head, d_model, dtype=dtype)

    def plain(t: Arguments, like: torch.dtype) -> Tensor:
        left, right = t["dz"].to(like).transpose(0, 1), t["w_o"].to(like)
        return (
            left @ right if t["base"] is None else torch.baddbmm(t["base"].to(like).expand(t["out"].shape), left, right)
        )

    def eager(t: Arguments) -> None:
        t["out"] = plain(t, torch.float32)

    return Problem(
        {"batch": batch, "head": head, "d_head": d_head, "d_model": d_model},
        {
            "base": draw(batch, d_model) if base else None,
            "dz": draw(batch, head, d_head),
            "w_o": w_o,
            "out": draw.empty(head, batch, d_model),
        },
        lambda t, backend: ops.head_write_rows(**t, backend=backend),
        eager,
        lambda t: (plain(t, torch.float64),),
        flop=2.0 * batch * head * d_head * d_model,
    )


def vocab_logsumexp(
    draw: Draw, dtype: torch.dtype, rows: int, d_model: int, d_vocab: int, bias: bool = False, softcap: float = 0.0
) -> Problem:
    def plain(t: Arguments, like: torch.dtype) -> Tensor:
        logits = t["normed"].to(like) @ t["unembed"].to(like).T
        logits = logits if t["bias"] is None else logits + t["bias"].to(like)
        return (softcap * torch.tanh(logits / softcap) if softcap else logits).logsumexp(-1)

    def eager(t: Arguments) -> None:
        t["out"] = plain(t, torch.float32)

    def in_dtype(t: Arguments) -> None:
        logits = t["normed"] @ t["unembed"].T  # as Hugging Face computes them, then fp32 for the sum
        t["out"] = logits.float().logsumexp(-1)

    return Problem(
        {"rows": rows, "d_model": d_model, "d_vocab": d_vocab},
        {
            "normed": draw(rows, d_model, dtype=dtype),
            "unembed": draw(d_vocab, d_model).div_(d_model**0.5).to(dtype),
            "bias": draw(d_vocab) if bias else None,
            "out": draw.empty(rows),
        },
        lambda t, backend: ops.vocab_logsumexp(**t, softcap=softcap, backend=backend),
        eager,
        lambda t: (plain(t, torch.float64),),
        flop=2.0 * rows * d_model * d_vocab,
        rivals={} if bias or softcap else {"torch, logits in their dtype": (in_dtype, 4 * torch.finfo(dtype).eps)},
    )


def slice_grad(
    draw: Draw, dtype: torch.dtype, tokens: int, m: int, n: int, rows: Ranges = None, columns: Ranges = None,
    accumulate: bool = False,
) -> Problem:  # fmt: skip
    """Rivals: the gradient of the whole weight in the dtype of its inputs, then its slice; and the reference."""
    sides = [(m, rows), (n, columns)]
    index = [
        torch.tensor([i for pair in ([(0, size)] if some is None else some) for i in range(*pair)], device=draw.device)
        for size, some in sides
    ]

    def plain(t: Arguments, like: torch.dtype) -> Tensor:
        found = t["left"][:, index[0]].to(like).T @ t["right"][:, index[1]].to(like)
        return found + t["out"].to(like) if accumulate else found

    def eager(t: Arguments) -> None:
        t["out"] = plain(t, torch.float32)

    def gathered(t: Arguments) -> None:
        full = t["left"].T @ t["right"]
        t["out"] = (full if rows is None else full[index[0]])[:, slice(None) if columns is None else index[1]].float()

    def run(t: Arguments, backend: str) -> object:
        return ops.slice_grad(**t, left_ranges=rows, right_ranges=columns, accumulate=accumulate, backend=backend)

    rivals = {
        "full gradient, gathered": (gathered, 4 * torch.finfo(dtype).eps),
        "vendor product": (lambda t: run(t, "reference"), None),
    }
    shape = tuple(len(some) for some in index)
    return Problem(
        {"tokens": tokens, "m": m, "n": n, "rows": rows, "columns": columns},
        {
            "left": draw(tokens, m, dtype=dtype),
            "right": draw(tokens, n, dtype=dtype),
            "out": draw(*shape) if accumulate else draw.empty(*shape),
        },
        run,
        eager,
        lambda t: (plain(t, torch.float64),),
        outs=() if accumulate else ("out",),
        flop=2.0 * tokens * shape[0] * shape[1],
        rivals={} if accumulate else rivals,
    )


def ablate_heads(
    draw: Draw, dtype: torch.dtype, variant: int, batch: int, pos: int, head: int, d_head: int,
    baseline: tuple[int, int] | None = None, one_head: bool = False, same_z: bool = False,
) -> Problem:  # fmt: skip
    """`baseline`: its sizes along batch and pos, or None for zero; `one_head`: one per variant, as in a sweep;
    `same_z`: all variants start from the same outputs, kept once."""

    shape = (batch, pos, head, d_head)
    ablate = draw.below(2, variant, head).bool()
    if one_head:
        variants, heads = (torch.arange(n, device=draw.device) for n in (variant, head))
        ablate = variants[:, None] % head == heads

    def plain(t: Arguments) -> Tensor:
        value = torch.zeros_like(t["z"][0]) if t["baseline"] is None else t["baseline"]
        return torch.where(t["ablate"][:, None, None, :, None], value, t["z"])

    def eager(t: Arguments) -> None:
        t["out"] = plain(t)

    return Problem(
        {"variant": variant, "batch": batch, "pos": pos, "head": head, "d_head": d_head},
        {
            "z": draw(1 if same_z else variant, *shape, dtype=dtype).expand(variant, *shape),
            "ablate": ablate,
            "baseline": None if baseline is None else draw(*baseline, head, d_head, dtype=dtype),
            "out": draw.empty(variant, *shape, dtype=dtype),
        },
        lambda t, backend: ops.ablate_heads(**t, backend=backend),
        eager,
        lambda t: (plain(t).double(),),
    )


def shared_prefix_attention(
    draw: Draw, dtype: torch.dtype, variant: int, batch: int, head: int, kv_head: int, pos: int, d_head: int,
    softcap: float = 0.0, window: int = 0, ragged: bool = True,
) -> Problem:  # fmt: skip
    """`ragged`: prompts of different lengths, one of them without a prefix."""
    scale = d_head**-0.5
    lengths = draw.below(pos + 1, batch) if ragged else torch.full((batch,), pos, device=draw.device)
    if ragged:
        lengths[0] = 0

    def plain(t: Arguments, like: torch.dtype) -> Tensor:
        def of_heads(name: str) -> Tensor:
            return t[name].to(like).repeat_interleave(head // kv_head, 2)

        q, place = t["q"].to(like), torch.arange(pos, device=draw.device)
        far = t["lengths"][:, None] - place
        seen = (far > 0) & (far < window) if window else far > 0
        scores = torch.einsum("vbhd,bphd->vbhp", q, of_heads("k")).masked_fill(~seen[:, None], -torch.inf)
        scores = scale * torch.cat([scores, (q * of_heads("k_own")).sum(-1, keepdim=True)], -1)
        weight = (softcap * torch.tanh(scores / softcap) if softcap else scores).where(scores > -torch.inf, -torch.inf)
        weight = weight.softmax(-1)
        shared = torch.einsum("vbhp,bphd->vbhd", weight[..., :-1], of_heads("v"))
        return shared + weight[..., -1:] * of_heads("v_own")

    def eager(t: Arguments) -> None:
        t["out"] = plain(t, dtype)

    own = (variant, batch, kv_head, d_head)
    return Problem(
        {"variant": variant, "batch": batch, "head": head, "kv_head": kv_head, "pos": pos, "d_head": d_head},
        {
            "q": draw(variant, batch, head, d_head, dtype=dtype),
            # as a cache lies in memory
            "k": draw(batch, kv_head, pos, d_head, dtype=dtype).transpose(1, 2),
            "v": draw(batch, kv_head, pos, d_head, dtype=dtype).transpose(1, 2),
            "k_own": draw(*own, dtype=dtype),
            "v_own": draw(*own, dtype=dtype),
            "lengths": lengths,
            "out": draw.empty(variant, batch, head, d_head, dtype=dtype),
        },
        lambda t, backend: ops.shared_prefix_attention(
            **t, scale=scale, softcap=softcap, window=window, backend=backend
        ),
        eager,
        lambda t: (plain(t, torch.float64),),
        flop=4.0 * variant * batch * head * (pos + 1) * d_head,
    )
