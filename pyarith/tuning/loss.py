"""Cross-entropy of a causal LM without its `[batch, pos, d_vocab]` logits, for a frozen unembedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyarith.errors import UnsupportedModelError, check
from pyarith.models.sites import ModelSites

IGNORED = -100  # labels that do not count, as in transformers
_CHUNK_BYTES = 128 << 20  # of the logits held at once: each block reads the whole unembedding twice


def label_loss(sites: ModelSites, labels: Tensor, *, reduction: str = "mean", **inputs: Any) -> Tensor:
    """Next-token cross-entropy on labelled positions, equal to the model's own ``labels=`` loss up to rounding.

        loss = mean or sum over (b, p) with labels[b, p + 1] != -100 of
               logsumexp(logits[b, p]) - logits[b, p, labels[b, p + 1]]

    Logits are computed for those positions only, a block of them at a time, and their gradient with respect to the
    final hidden states in the same pass: two matrix products as in any training step, with no tensor of the size of
    all logits. The unembedding must be frozen.

    Args:
        sites: of the model.
        labels: int64 [batch, pos]; -100 is left out. Position 0 predicts label 1, as in transformers.
        reduction: "mean" or "sum".
        inputs: for the decoder: ``input_ids``, ``attention_mask``, ``position_ids``.
    Returns:
        A scalar in fp32 (fp64 for fp64 models) with a gradient towards the decoder.
    Raises:
        InputError: no label is left, or another reduction.
        UnsupportedModelError: the unembedding is trained.
    """
    weight: Any = sites.unembed.weight
    bias: Tensor | None = getattr(sites.unembed, "bias", None)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise UnsupportedModelError(
            "model: expected a frozen unembedding; use the model's own loss (labels=...) where it is trained"
        )
    check(reduction in ("mean", "sum"), f"reduction: expected mean or sum, got {reduction!r}")
    targets = labels[:, 1:]
    counted = targets != IGNORED
    hidden = sites.decoder(**inputs, use_cache=False)[0][:, :-1][counted]
    targets = targets[counted]
    check(len(targets) > 0, "labels: expected at least one label other than -100 after the first position")
    share = 1.0 / len(targets) if reduction == "mean" else 1.0
    factors = (share, sites.logit_scale, sites.softcap)
    loss: Tensor = _VocabLoss.apply(hidden, weight, bias, targets, factors, sites.row_dtype)
    return loss


class _VocabLoss(torch.autograd.Function):
    """share * sum over rows of logsumexp(y) - y[target], y = cap(scale * (h W^T + bias)); the gradient for h is made in
    the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factors: tuple[float, float, float],
        wide: torch.dtype,
    ) -> Tensor:
        share, scale, cap = factors
        rows = max(16, _CHUNK_BYTES // (weight.shape[0] * wide.itemsize))
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        buffer = hidden.new_empty(min(rows, len(hidden)), weight.shape[0])
        for start in range(0, len(hidden), rows):
            part, goal = hidden[start : start + rows], targets[start : start + rows, None]
            narrow = buffer[: len(part)]
            if bias is None:
                torch.mm(part, weight.t(), out=narrow)
            else:
                torch.addmm(bias, part, weight.t(), out=narrow)
            logits = narrow.to(wide)  # fp32 itself, or a copy of 16-bit logits, as transformers makes
            if scale != 1.0:
                logits = logits.mul_(scale)
            slope = None
            if cap:
                logits = logits.div_(cap).tanh_()
                slope = 1 - logits * logits
                logits = logits.mul_(cap)
            aimed = logits.gather(1, goal)
            top = logits.amax(1, keepdim=True)
            # softmax = weights / mass; dividing the product's rows costs d_model numbers a row in place of d_vocab
            weights = logits.sub_(top).exp_()
            mass = weights.sum(1, keepdim=True)
            total += (mass.log() + top - aimed).sum()
            if grad is None:
                continue
            aim = torch.ones_like(aimed)
            if slope is not None:
                weights.mul_(slope)
                aim = slope.gather(1, goal)
            pushed = (weights.to(weight.dtype) @ weight).to(wide) / mass
            pulled = weight[goal[:, 0]].to(wide) * aim
            grad[start : start + rows] = (pushed - pulled).mul_(share * scale)
        ctx.save_for_backward(*([] if grad is None else [grad]))
        return total * share

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None, None, None
