"""Ablated sets re-run literally: one forward pass of the model with hooks, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from pyarith.ablation_result import Ablation
from pyarith.engine import oracle
from pyarith.engine.baselines import Baseline
from pyarith.engine.guard import Hooks
from pyarith.errors import SelfCheckError
from pyarith.models.sites import ModelSites

_PROMPTS = 2


def literal(
    sites: ModelSites, ids: Tensor, target: int, ablation: Ablation, baseline: Baseline, prompt: int, end: bool
) -> float:
    """Logit of ``target`` after one unpadded prompt [pos], in one forward pass with the set's sites overwritten."""
    at = slice(-1, None) if end else slice(None)
    pos = len(ids)

    def value(values: Tensor | None) -> Any:
        if values is None:
            return 0.0
        values = values[prompt if len(values) > 1 else 0]
        return values if len(values) == 1 else values[:pos][at]

    def heads_of(layer: int) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            z = x.clone().unflatten(-1, (sites.n_heads, sites.d_head))
            new = value(baseline.head_values(sites, layer))
            for head in (h.head for h in ablation.heads if h.layer == layer):
                z[0, at, head] = new[:, head] if isinstance(new, Tensor) else new
            return z.flatten(-2)

        return call

    def mlp_of(layer: int) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            x = x.clone()
            x[0, at] = value(baseline.mlp_values(sites, layer))
            return x

        return call

    with Hooks() as hooks:
        for layer in sorted({head.layer for head in ablation.heads}):
            hooks.before(sites.blocks[layer].o_proj, heads_of(layer))
        for layer in ablation.mlps:
            hooks.after(sites.blocks[layer].mlp_write, mlp_of(layer))
        return float(oracle._forward(sites, ids)[target])


def verify(
    sites: ModelSites,
    ids: Tensor,
    lengths: Tensor,
    answers: Tensor,
    sets: tuple[Ablation, ...],
    arrays: dict[str, Any],
    baseline: Baseline,
    end: bool,
    number: int,
) -> float:
    """Literal re-runs of the ``number`` strongest sets on at most two prompts; the largest difference in logits.

    Args:
        ids: int64 [batch, pos], left-aligned; ``lengths`` [batch] tokens of each, ``answers`` [batch].
        arrays: logits [n_sets, batch], identity_logits and clean_logits [batch] of the sweep.

    Raises:
        SelfCheckError: sweep and literal re-run disagree beyond rounding.
    """
    change = np.abs(arrays["logits"] - arrays["identity_logits"]).mean(-1)
    floor = float(np.abs(arrays["identity_logits"] - arrays["clean_logits"]).max())
    worst = 0.0
    for row in np.argsort(-change, kind="stable")[:number].tolist():
        for i in range(min(_PROMPTS, len(ids))):
            found = literal(sites, ids[i, : int(lengths[i])], int(answers[i]), sets[row], baseline, i, end)
            swept = float(arrays["logits"][row, i])
            worst = max(worst, abs(found - swept))
            allowed = oracle.tolerance(sites, max(abs(found), 1.0)) + 4 * floor
            if not abs(found - swept) <= allowed:
                what = (
                    f"verification: family {sites.spec.name!r}, set {sets[row]}, prompt {i}: a literal re-run gives "
                    f"logit {found:.6g}, the sweep {swept:.6g} (tolerance {allowed:.2g})"
                )
                if not oracle.excused(sites, what):
                    raise SelfCheckError(f"{what}; no result is given")
    return worst
