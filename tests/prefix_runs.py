"""Small training runs with and without a ``PrefixCache``, for its tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from tiny_models import VOCAB, make, pad
from true_fp64 import true_fp64

import pyarith as pa
from pyarith.tuning import PrefixCache

Batch = dict[str, Any]
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}  # GPT-2's own default is 0.1


def rows(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def batch(chosen: list[list[int]], side: str = "right") -> Batch:
    """Ids, mask, positions and labels; padding has no label."""
    ids, mask = pad(chosen, side)
    if mask is None:
        return {"input_ids": ids, "labels": ids.clone()}
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def fixed() -> list[Batch]:
    """Three batches, one of each kind of padding."""
    return [
        batch(rows((6, 6, 6), 1), "none"),
        batch(rows((5, 8, 4), 2), "left"),
        batch(rows((7, 3, 6), 3), "right"),
    ]


def reshuffled(epoch: int) -> list[Batch]:
    """Nine examples in batches of three whose company and width change from epoch to epoch."""
    every = rows((7, 5, 9, 6, 4, 8, 3, 5, 7))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(epoch + 10)).tolist()
    return [batch([every[i] for i in order[start : start + 3]]) for start in (0, 3, 6)]


def tuner(model: Any, first: int = 1) -> pa.SelectiveTuner:
    """Heads from layer ``first`` on, and the last MLP."""
    last = model.config.num_hidden_layers - 1
    return pa.SelectiveTuner(model, [(first, 1), (last, 2)], mlps=[last])


def train(
    model: Any,
    data: Callable[[int], list[Batch]],
    cache: Callable[[pa.SelectiveTuner], PrefixCache] | None = None,
    epochs: int = 3,
    first: int = 1,
    optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
) -> tuple[list[float], dict[str, torch.Tensor], PrefixCache | None]:
    """Losses, final weights and the cache of a run."""
    fp64 = next(model.parameters()).dtype == torch.float64
    losses = []
    with true_fp64() if fp64 else nullcontext(), tuner(model, first) as trained:
        kept = None if cache is None else cache(trained)
        steps = optimizer(trained.parameters())
        with nullcontext() if kept is None else kept:
            for epoch in range(epochs):
                for one in data(epoch):
                    loss = model(**one, use_cache=False).loss
                    loss.backward()
                    steps.step()
                    steps.zero_grad()
                    losses.append(loss.item())
    return losses, {name: value.clone() for name, value in model.state_dict().items()}, kept


def same(a: Any, b: Any) -> bool:
    """Whether two runs have the same losses and weights, bit by bit."""
    return a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def tiny(name: str = "llama-gqa2", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A model in training mode without dropout."""
    return make(name, dtype, **{**(NO_DROPOUT if name == "gpt2" else {}), **overrides}).train()
