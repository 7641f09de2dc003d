"""Rotary embeddings beyond the plain one; some change with the length of what goes through the model at once."""

from __future__ import annotations

from typing import Any

import literal_oracle
import numpy as np
import pytest
import snapshot
from single_thread import one_thread  # noqa: F401
from tiny_models import Prompt, inputs, make, prompts
from true_fp64 import true_fp64

import pyarith as pa
from pyarith.errors import InputError, UnsupportedModelError

ORIGINAL = 16  # tokens for which the tiny models claim to be trained
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
OWN = {"original_max_position_embeddings": ORIGINAL, "rope_theta": 1e4}
# id: (family, config, may the lengths in a batch change the numbers of transformers itself)
ROPES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, False),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3, **OWN}}, False),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **OWN}}, False),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": ORIGINAL,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        },
        True,
    ),
    "longrope": (
        "phi3",
        {"original_max_position_embeddings": ORIGINAL, "rope_parameters": {**LONGROPE, **OWN}},
        True,
    ),
}
LENGTHS: dict[str, list[Prompt]] = {
    "short": prompts((7, 5, 9)),
    "long": prompts((21, 19, 23), shared=17, differ=(18,)),
    "mixed": prompts((7, 23, 20)),
    "prefix-short": prompts((16, 18, 19), shared=15, differ=(-1,)),
    "just-fits": prompts((16, 15, 16), shared=14, differ=(-1,)),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("rope", ROPES)
def test_rope(rope: str, lengths: str) -> None:
    """Every prompt gets the numbers that it has alone, or the call is refused by the name of the rope."""
    (family, config, depends_on_length), pairs = ROPES[rope], LENGTHS[lengths]
    model = make(family, **config)
    with true_fp64():
        expected = literal_oracle.path_patch(model, pairs)
        given = inputs(pairs, expected.answers, "left")
        with snapshot.unchanged(model):
            try:
                result = pa.fast_patch(model, **given, progress=False, verify=0)
            except (UnsupportedModelError, InputError) as error:
                assert depends_on_length and lengths not in ("short", "just-fits")
                assert rope in str(error)
                return
    heads, mlps, clean, corrupted = expected.at(expected.answers)
    np.testing.assert_allclose(result.clean_logits, clean, rtol=1e-12, atol=2e-12)
    np.testing.assert_allclose(result.corrupted_logits, corrupted, rtol=1e-12, atol=2e-12)
    np.testing.assert_allclose(result.head_logits, heads, rtol=1e-12, atol=2e-12)
    np.testing.assert_allclose(result.mlp_logits, mlps, rtol=1e-12, atol=2e-12)
