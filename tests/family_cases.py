"""One case of each test that every family passes, for families that do not go through all of them."""

from __future__ import annotations

from typing import Any

import sweep_oracle
import test_ablation
import test_analysis_attention
import test_analysis_attribution
import test_analysis_cosines
import test_boost
import test_families
import test_state_restored
import test_true_fp64
import test_tuner
from tiny_models import make
from true_fp64 import true_fp64

import pyarith as pa

CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "exact": (test_families.test_exact, ("recomputed", "left")),
    "fp32": (test_families.test_fp32, ()),
    "no-fp32": (test_true_fp64.test_no_fp32, ()),
    "padding": (test_true_fp64.test_padding_needs_position_ids_only, ()),
    "zero": (test_ablation.test_zero, ("left",)),
    "mean": (test_ablation.test_mean_is_the_mean_over_real_tokens, ("right",)),
    "boost": (test_boost.test_exact, (0.3, "left")),
    "attention": (test_analysis_attention.test_eager, ("left",)),
    "attribution": (test_analysis_attribution.test_attribution, ("left",)),
    "cosines": (test_analysis_cosines.test_cosines, ("left",)),
    "restored": (test_state_restored.test_after_a_run, ()),
    "tuner": (test_tuner.test_gradients_are_those_of_the_whole_model_at_the_chosen_entries, ("group",)),
}


def check_sweep(name: str, where: str, sets: Any = sweep_oracle.SETS[1:6], kind: str = "zero") -> None:
    """Sets of heads and MLPs against one hooked forward pass each; the prompts are longer than every window."""
    model, ids = make(name), sweep_oracle.rows((9, 7))
    with true_fp64():
        baseline = sweep_oracle.make_baseline(kind, model, ids)
        expected = sweep_oracle.reference(model, ids, sets, baseline, where)
        result = pa.ablation_sweep(
            model, **sweep_oracle.given(ids), sets=sets, baseline=baseline, positions=where, **sweep_oracle.QUIET
        )
    sweep_oracle.agree(result, expected)
