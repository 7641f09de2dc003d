"""Heads drawn at random as controls for chosen ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyarith.types import Head


def random_heads(n: int, every: Sequence[Head], rng: np.random.Generator) -> list[Head]:
    """``n`` of ``every`` head; by chance some of the chosen ones may be among them."""
    return [every[i] for i in rng.permutation(len(every))[:n]]


def same_layer_heads(heads: Sequence[Head], every: Sequence[Head], rng: np.random.Generator) -> list[Head]:
    """As many others of ``every`` head in each layer as ``heads`` has there; its own only where others are too few."""
    drawn: list[Head] = []
    for layer in sorted({head.layer for head in heads}):
        own = [head for head in heads if head.layer == layer]
        others = [head for head in every if head.layer == layer and head not in own]
        picked = [others[i] for i in rng.permutation(len(others))[: len(own)]]
        drawn += picked + [own[i] for i in rng.permutation(len(own))[: len(own) - len(picked)]]
    return drawn
