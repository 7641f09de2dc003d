"""Tuned tiny models and their deltas, for the tests of deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import torch

import pyarith as pa

HEADS = [(1, 0), (1, 3), (2, 2)]
MLPS = [1]


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: Any, expected: dict[str, torch.Tensor]) -> bool:
    """Whether a model holds these bits, under these names, and no others."""
    found = model.state_dict()
    return list(found) == list(expected) and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def shift(tuner: Any, seed: int) -> None:
    """New values for every slice."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in tuner.parameters():
            value.add_(torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype))


def tuned(model: Any, folder: Path, heads: Any = HEADS, mlps: Any = MLPS, seed: int = 0, **options: Any) -> Any:
    """Train ``model`` (in effect), save the delta; returns the state that was trained."""
    with pa.SelectiveTuner(model, heads, mlps, **options) as tuner:
        shift(tuner, seed)
        tuner.save_delta(folder, {"lr": 1e-3, "seed": seed})
    return state(model)


def base(name: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    return tiny_models.make(name, dtype, **overrides)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(tiny_models.VOCAB, (2, 7), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids).logits
