"""From residual rows to logits: norms, the final norm, the answer's logit, log-sum-exp over the vocabulary."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyarith import ops
from pyarith.errors import UnsupportedModelError
from pyarith.models.sites import ModelSites
from pyarith.models.weights import NormWeights, fetch_projection, read_norm


@dataclass(frozen=True)
class RowLogits:
    """Results of a block: logits [variant, batch, target], log-sum-exp [variant, batch] or None."""

    logits: Tensor
    lse: Tensor | None

    @staticmethod
    def cat(parts: list[RowLogits]) -> RowLogits:
        lse = [part.lse for part in parts if part.lse is not None]
        return RowLogits(torch.cat([part.logits for part in parts]), torch.cat(lse) if lse else None)


class Norm:
    """A norm as one fused op, or the model's own module where it is not the known pattern; None changes nothing."""

    def __init__(self, sites: ModelSites, module: nn.Module | None, backend: str) -> None:
        self.module, self.dtype, self.backend = module, sites.dtype, backend
        self.weights: NormWeights | None = None if module is None else read_norm(sites, module)

    def __call__(self, rows: Tensor, delta: Tensor | None, write: Tensor | None, out: Tensor) -> None:
        """``rows += delta + write`` in place, ``out = norm(rows)``."""
        w = self.weights
        if w is not None:
            ops.add_norm(rows, delta, write, w.weight, w.bias, w.eps, w.kind, out=out, backend=self.backend)
            return
        if delta is not None:
            rows.add_(delta)
        if write is not None:
            rows.add_(write)
        out.copy_(rows if self.module is None else self.module(rows.to(self.dtype)))


def split(n: int, size: int) -> list[tuple[int, int]]:
    """[0, n) in equal blocks of at most ``size``."""
    count = -(-n // size)
    edges = [n * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def split_norm(
    norm: Norm, rows: Tensor, a: int, b: int, before: int, waiting: Tensor | None, write: Tensor | None, out: Tensor
) -> None:
    """Norm of rows[a:b]; only rows below ``before`` have something waiting."""
    cut = min(max(before, a), b)
    if cut > a:
        norm(rows[a:cut], None if waiting is None else waiting[a:cut], write, out[: cut - a])
    if cut < b:
        norm(rows[cut:b], None, None, out[cut - a :])


@dataclass(frozen=True)
class Unembedding:
    """The unembedding; where it lies in a file, rows and chunks of it are brought to the device as they are needed.

    Attributes:
        weight: [d_vocab, d_model], wherever and in whatever dtype it is kept.
        bias: [d_vocab] on ``device``, or None.
        device, dtype: where and in what the model computes.
    """

    weight: Tensor
    bias: Tensor | None
    device: torch.device
    dtype: torch.dtype

    @property
    def apart(self) -> bool:
        """Whether the weight is kept somewhere else, or in another dtype."""
        return self.weight.device != self.device or self.weight.dtype != self.dtype

    def rows(self, tokens: Tensor) -> Tensor:
        """[..., d_model] of tokens [...]."""
        return self.weight[tokens.to(self.weight.device)].to(self.device, self.dtype)

    def log_sum_exp(self, normed: Tensor, scale: float, softcap: float, backend: str) -> Tensor:
        """``ops.vocab_logsumexp`` of normed [rows, d_model]; chunks as those of the plain implementation, whose numbers
        they give."""
        bias = None if self.bias is None else self.bias * scale
        how: Any = {"scale": scale, "softcap": softcap, "backend": backend}
        if not self.apart:
            return ops.vocab_logsumexp(normed, self.weight, bias, **how)
        total, step = None, ops.vocab_chunk_tokens(*normed.shape)
        for start in range(0, len(self.weight), step):
            part = slice(start, start + step)
            weight = self.weight[part].to(self.device, self.dtype)
            found = ops.vocab_logsumexp(normed, weight, None if bias is None else bias[part], **how)
            total = found if total is None else torch.logaddexp(total, found)
        assert total is not None
        return total

    def scratch_bytes(self, rows: int, wide: torch.dtype) -> int:
        """What ``log_sum_exp`` holds at most."""
        d_vocab, d_model = self.weight.shape
        copied = (
            min(ops.vocab_chunk_tokens(rows, d_model), d_vocab) * d_model * self.dtype.itemsize if self.apart else 0
        )
        return copied + ops.vocab_scratch_bytes(rows, d_vocab, d_model, self.dtype, wide)


def read_unembed(sites: ModelSites) -> Unembedding:
    """The unembedding of a model.

    Raises:
        UnsupportedModelError: it is not a plain linear layer.
    """
    projection = fetch_projection(sites.unembed)
    if projection is None:
        raise UnsupportedModelError(
            f"model: family {sites.spec.name!r}: expected {sites.spec.unembed} to be a plain nn.Linear without hooks "
            f"or parametrisations, found {type(sites.unembed).__name__}"
        )
    return Unembedding(projection.matrix.t(), projection.bias, sites.device, sites.dtype)


class Readout:
    """Final norm and unembedding rows for the targets of a block of prompts (int64 [batch, target])."""

    def __init__(
        self, sites: ModelSites, final_norm: Norm, unembed: Unembedding, targets: Tensor, backend: str
    ) -> None:
        self.sites, self.norm, self.unembed, self.backend = sites, final_norm, unembed, backend
        self.rows = unembed.rows(targets)  # [batch, target, d_model]
        self.bias = None if unembed.bias is None else unembed.bias[targets]

    def read(
        self,
        rows: Tensor,
        a: int,
        b: int,
        before: int,
        waiting: Tensor | None,
        write: Tensor | None,
        x: Tensor,
        log_probs: bool,
    ) -> RowLogits:
        """Logits of rows[a:b]; those below ``before`` first receive ``waiting`` and ``write``; x is scratch."""
        w = self.norm.weights
        cut = min(max(before, a), b)
        pieces = [(a, cut, write), (cut, b, None)]
        if w is None or log_probs or waiting is not None:
            split_norm(self.norm, rows, a, b, before, waiting, write, x)
            pieces = [(a, b, None)]  # the rows now hold everything
        if w is None:
            return RowLogits(self.of_hidden(x), self.log_sum_exp(x) if log_probs else None)
        logits = rows.new_empty(b - a, *self.rows.shape[:2])
        for low, high, incoming in pieces:
            if low < high:
                ops.answer_logits(
                    rows[low:high],
                    incoming,
                    w.weight,
                    w.bias,
                    w.eps,
                    w.kind,
                    self.rows,
                    None if self.bias is None else self.bias * self.sites.logit_scale,  # added behind the scale
                    scale=self.sites.logit_scale,
                    softcap=self.sites.softcap,
                    out=logits[low - a : high - a],
                    backend=self.backend,
                )
        return RowLogits(logits, self.log_sum_exp(x) if log_probs else None)

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """Target logits of decoder outputs: [..., batch, d_model] -> [..., batch, target]."""
        wide = self.sites.row_dtype
        value = (hidden.to(wide)[..., None, :] * self.rows.to(wide)).sum(-1)
        if self.bias is not None:
            value = value + self.bias.to(wide)
        return self.sites.logits_of(value)

    def log_sum_exp(self, hidden: Tensor) -> Tensor:
        """Log-sum-exp over the vocabulary: [..., d_model] -> [...]; no [..., d_vocab] is held."""
        flat = self.unembed.log_sum_exp(hidden.flatten(0, -2), self.sites.logit_scale, self.sites.softcap, self.backend)
        return flat.view(hidden.shape[:-1])
