"""END's attention for many variants over one stored copy of the clean keys and values.

The model's own attention modules run with an attention function of ours: it takes END's query, key and value after
the rotary embedding and attends to the clean keys of the earlier positions, which all variants share (SEMANTICS,
"END-only ablation": a one-token decode on the clean prefix's cache).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from pyarith import ops
from pyarith.engine.sweep_inputs import Clean
from pyarith.models.sites import ModelSites
from pyarith.ops.answer_logits import softcapped

_NAME = "pyarith_shared_prefix"


class SharedPrefix:
    """The clean keys and values of a block of prompts; ``layer`` is set before each block is called."""

    def __init__(self, sites: ModelSites, clean: Clean, backend: str) -> None:
        self.clean, self.windows, self.backend = clean, sites.windows, backend
        self.ends = clean.lengths - 1
        self.layer = 0

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """query [variant * batch, head, 1, d_head], key, value [variant * batch, kv_head, 1, d_head] of END."""
        batch = self.clean.batch
        q, k_own, v_own = (x[:, :, 0].unflatten(0, (-1, batch)) for x in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        found = ops.shared_prefix_attention(
            q,
            self.clean.keys[self.layer],
            self.clean.values[self.layer],
            k_own,
            v_own,
            self.ends,
            scale=scale,
            softcap=softcap or 0.0,
            window=self.windows[self.layer] or 0,
            backend=self.backend,
        )
        if sinks is not None:
            found *= self._beside_sinks(q, k_own, scale, softcap, sinks)
        return found.flatten(0, 1)[:, None]

    def _beside_sinks(self, q: Tensor, k_own: Tensor, scale: float, softcap: float | None, sinks: Tensor) -> Tensor:
        """The share of attention that a head's sink leaves to the keys, [variant, batch, head, 1].

        A sink is one more score in the softmax, with nothing to read: share = sum_p e^s[p] / (sum_p e^s[p] + e^sink).
        The op knows no sinks, so the scores are taken once more, variant by variant.
        """
        keys, wide = self.clean.keys[self.layer], torch.promote_types(q.dtype, torch.float32)
        distance = self.ends[:, None] - torch.arange(keys.shape[1], device=q.device)  # from END, [batch, pos]
        seen = (distance > 0) & (distance < (self.windows[self.layer] or keys.shape[1] + 1))
        shares = []
        for query, own in zip(q, k_own, strict=True):
            grouped = query.to(wide).unflatten(1, (keys.shape[2], -1))
            shared = torch.einsum("bjgd,bpjd->bjgp", grouped, keys.to(wide)) * scale
            mine = torch.einsum("bjgd,bjd->bjg", grouped, own.to(wide))[..., None] * scale
            scores = torch.cat([softcapped(shared, softcap or 0.0), softcapped(mine, softcap or 0.0)], -1)
            scores[..., :-1].masked_fill_(~seen[:, None, None], -torch.inf)
            shares.append(torch.sigmoid(scores.logsumexp(-1).flatten(1) - sinks.to(wide)))
        return torch.stack(shares)[..., None].to(q.dtype)


_active: ContextVar[SharedPrefix | None] = ContextVar(_NAME, default=None)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; the mask knows nothing of the stored keys and is not looked at."""
    prefix = _active.get()
    assert prefix is not None
    return prefix.attend(query, key, value, scaling, softcap, s_aux), None


@contextmanager
def shared_prefix(sites: ModelSites, prefix: SharedPrefix) -> Iterator[None]:
    """The model's attention modules attend to ``prefix`` inside this context."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention)
    configs: dict[int, Any] = {
        id(module.config): module.config for module in sites.model.modules() if hasattr(module, "config")
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    token = _active.set(prefix)
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield
    finally:
        _active.reset(token)
        for key, config in configs.items():
            config._attn_implementation = before[key]
