"""Heads drawn as controls."""

from __future__ import annotations

import numpy as np

from pyarith.stats import random_heads, same_layer_heads
from pyarith.types import Head

EVERY = [Head(layer, head) for layer in range(3) for head in range(4)]


def test_same_layer_heads_are_as_many_per_layer_and_others_where_there_are_some():
    key, rng = [Head(1, 0), Head(1, 1), Head(1, 2), Head(2, 3)], np.random.default_rng(0)
    drawn = [same_layer_heads(key, EVERY, rng) for _ in range(30)]
    for one in drawn:
        assert sorted(head.layer for head in one) == [1, 1, 1, 2] and len(set(one)) == 4
        assert Head(1, 3) in one and Head(2, 3) not in one  # layer 1 has one other head only
    assert len({tuple(sorted(one)) for one in drawn}) == 9  # two of three own heads in layer 1, one of three in layer 2


def test_random_heads_are_different_ones_of_all():
    rng = np.random.default_rng(0)
    drawn = [tuple(random_heads(4, EVERY, rng)) for _ in range(200)]
    assert all(len(set(one)) == 4 for one in drawn) and len(set(drawn)) > 180
    counts = np.array([sum(head in one for one in drawn) for head in EVERY])
    assert abs(counts - 200 / 3).max() < 30  # every head about as often
