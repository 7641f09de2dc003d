"""How MLPs turn operands into the answer: cosines of their input and their write with unembedding rows, at END."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyarith.analysis.inputs import TOKENS, Array, Prompts, read_prompts, read_tokens
from pyarith.analysis.states import end_states, frame, host
from pyarith.engine import guard
from pyarith.engine.batch import name_prompts, read_ids
from pyarith.engine.readout import read_unembed
from pyarith.errors import InputError, check
from pyarith.models.sites import resolve

CURVES = ("operand_a", "operand_b", "answer")


class ThreePoints(NamedTuple):
    """Layers where a curve starts to rise, rises most, and has arrived."""

    start: int
    inflection: int
    end: int


def three_points(curve: Any) -> ThreePoints | None:
    """Start, inflection and end of the rise of a curve over layers.

    With low and high the curve's smallest and largest value, and the peak the first layer that has the largest:
    ``start`` is the layer after the last one before the peak that lies below low + 10 % of (high - low), ``end`` the
    same with 90 %, ``inflection`` the layer in start..end that lies most above the layer before it (layer 0: above low;
    of several the first). So start <= inflection <= end <= peak, also for curves with bumps before their rise.

    Args:
        curve: [n_layers].
    Returns:
        The three layers, or None where the curve is flat or not finite.
    Raises:
        InputError: not one-dimensional, or empty.
    References: Zhang et al. 2024, arXiv:2409.01659, sec. 3, which reads 13-18-28 off LLaMA2-7B's curve by eye.
    """
    values = np.asarray(curve, np.float64)
    check(values.ndim == 1 and values.size > 0, f"curve: expected [n_layers], got shape {values.shape}")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(values).all() or low == high:
        return None
    peak = int(values.argmax())

    def risen(share: float) -> int:
        below = np.flatnonzero(values[:peak] < low + share * (high - low))
        return int(below[-1]) + 1 if below.size else 0

    start, end = risen(0.1), risen(0.9)
    steps = np.diff(values, prepend=low)
    return ThreePoints(start, start + int(steps[start : end + 1].argmax()), end)


@dataclass(frozen=True, repr=False)
class MlpCosines:
    """Cosines at END per layer and prompt.

    MLP_in is the residual stream that the MLP's norm reads, MLP_out = MLP_in + what the MLP adds, so that MLP_out -
    MLP_in is the MLP's write in every family: in a serial block MLP_in is the stream after attention and MLP_out the
    block's output; in a parallel block MLP_in is the block's input, and the attention's write is in neither; where a
    norm follows the MLP the write is what comes out of that norm. W_U[t] is the row of the unembedding matrix, without
    its bias and without the final norm's weight.

    Attributes:
        operand_a, operand_b: [n_layers, batch] cos(MLP_in, W_U[A]), cos(MLP_in, W_U[B]); fp32, fp64 for fp64 models.
        answer: [n_layers, batch] cos(MLP_out - MLP_in, W_U[C]).
        settings: model, number of prompts.
    """

    operand_a: Array
    operand_b: Array
    answer: Array
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> dict[str, Array]:
        """Curve name -> [n_layers] mean over the prompts, fp64."""
        return {name: getattr(self, name).mean(-1, dtype=np.float64) for name in CURVES}

    @property
    def spread(self) -> dict[str, Array]:
        """Curve name -> [n_layers] standard deviation over the prompts, fp64."""
        return {name: getattr(self, name).std(-1, dtype=np.float64) for name in CURVES}

    @property
    def points(self) -> ThreePoints | None:
        """Start, inflection and end of the mean answer curve, by the rule of ``three_points``."""
        return three_points(self.mean["answer"])

    def rows(self) -> Iterator[dict[str, Any]]:
        """The table of ``to_dataframe`` as dictionaries."""
        mean, spread = self.mean, self.spread
        for layer in range(len(self.answer)):
            row: dict[str, Any] = {"layer": layer}
            for name in CURVES:
                row |= {name: float(mean[name][layer]), f"{name}_spread": float(spread[name][layer])}
            yield row

    def to_dataframe(self) -> Any:
        """One row per layer: mean and spread of the three curves."""
        return frame(self.rows())

    def __repr__(self) -> str:
        at = "flat" if self.points is None else "-".join(map(str, self.points))
        lines = [f"MlpCosines: {self.answer.shape[1]} prompts; the answer's start-inflection-end: {at}"]
        lines.append("  layer" + "".join(f"{name:>12}" for name in CURVES))
        for row in self.rows():
            lines.append(f"{row['layer']:>7}" + "".join(f"{row[name]:>+12.4f}" for name in CURVES))
        return "\n".join(lines)


def mlp_cosines(
    model: Any,
    prompts: Any,
    *,
    attention_mask: Any = None,
    answers: Any = None,
    operands: Any = None,
    tokens_per_pass: int = TOKENS,
) -> MlpCosines:
    """Cosines of every MLP's input with the operands and of its write with the answer, at END.

    cos(MLP_in, W_U[A]), cos(MLP_in, W_U[B]), cos(MLP_out - MLP_in, W_U[C]); see ``MlpCosines`` for the terms.

    Args:
        model: a supported Hugging Face causal LM; never changed.
        prompts: ``PromptPairs`` (the clean prompts are used), or int64 [batch, pos].
        attention_mask: [batch, pos] for ids that are not ``PromptPairs``; padding at either side.
        answers: int64 [batch], ids of C, for ids that are not ``PromptPairs``.
        operands: int64 [batch, 2], ids of A and B; None takes the tokens in the prompt whose roles are operand_a and
            operand_b.
        tokens_per_pass: about how many tokens go through the model at a time.
    Returns:
        ``MlpCosines``. A cosine with a vector of length 0 is 0.
    Raises:
        InputError, InputTypeError: bad ids, no answers, no roles, an operand that is not one token in some prompts.
        UnsupportedModelError: not a supported model, or its unembedding is not a plain linear layer.
    References: Zhang et al. 2024, arXiv:2409.01659, sec. 3 (MLPs at END).
    """
    sites, tokens = resolve(model), read_tokens(tokens_per_pass)
    given = read_prompts(sites, prompts, attention_mask, answers)
    ids = _operands(given) if operands is None else read_ids(operands, "operands", 2, sites.d_vocab)
    check(ids.shape == (len(given), 2), f"operands: expected [batch, 2] = [{len(given)}, 2], got {list(ids.shape)}")
    targets = torch.cat([ids, given.need_answers()[:, None]], 1)
    out = np.zeros((3, sites.n_layers, len(given)), np.float64 if sites.row_dtype == torch.float64 else np.float32)
    with guard.untouched(sites.model):
        unembed = read_unembed(sites)
        for indices, states in end_states(sites, given, ("mlp_in", "mlp_write"), tokens):
            rows = unembed.rows(targets[indices]).to(sites.row_dtype)  # [batch, 3, d_model]
            mlp_in, write = (states[name].to(sites.row_dtype) for name in ("mlp_in", "mlp_write"))
            for number, vector in enumerate((mlp_in, mlp_in, write)):
                out[number][:, indices.numpy()] = host(_cosine(vector, rows[:, number]))
    return MlpCosines(out[0], out[1], out[2], settings={"model": sites.spec.name, "prompts": len(given)})


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    dot = (a * b).sum(-1)
    size = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(size > 0, dot / torch.where(size > 0, size, 1), 0)


def _operands(prompts: Prompts) -> Tensor:
    """int64 [batch, 2]: the one token id of operand A and of operand B in each prompt, by the roles."""
    roles, names = prompts.need_roles(), prompts.role_names
    found = []
    for name in CURVES[:2]:
        if name not in names:
            raise InputError(f"roles: expected a role {name!r}, got {names}; pass operands=, int64 [batch, 2]")
        at = roles == names.index(name)
        ids = prompts.ids.gather(1, at.int().argmax(1, keepdim=True))
        several = at.sum(1) != 1
        check(
            not bool(several.any()),
            f"roles: expected one token with the role {name!r} in every prompt; prompts {name_prompts(several)} have "
            "none or several; leave them out (pairs.subset) or pass operands=, int64 [batch, 2]",
        )
        found.append(ids[:, 0])
    return torch.stack(found, 1)
