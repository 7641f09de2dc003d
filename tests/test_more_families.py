"""Further dense families: what every family goes through, in one case each, and what only they do."""

from __future__ import annotations

from typing import Any

import literal_oracle
import numpy as np
import pytest
import sweep_oracle
import test_ablation
import test_analysis_lens
import test_families
import test_prefix_cache
import test_tuner
import test_tuner_training
import test_tuning_batches
import torch
from family_cases import CASES, check_sweep
from single_thread import one_thread  # noqa: F401
from test_families import QUIET, agree
from tiny_models import MORE, VOCAB, inputs, make, prompts
from true_fp64 import true_fp64

import pyarith as pa
from pyarith.analysis import attention_mass
from pyarith.errors import SelfCheckError, UnsupportedModelError
from pyarith.models.families import FAMILIES
from pyarith.models.sites import resolve

FALCON = [name for name in MORE if name.startswith("falcon")]
OWN_ATTENTION = ["gptj", *FALCON]  # not through the AttentionInterface

MORE_CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "lens": (test_analysis_lens.test_lens, ("left",)),
    "frozen-mlps": (test_families.test_exact, ("frozen", "left")),
    "training": (test_tuner_training.test_all_heads_and_mlps_equal_adamw_with_the_rest_frozen, ()),
    "bits": (test_tuner_training.test_twenty_steps_leave_every_other_entry_bit_identical, ("own",)),
    "loss": (test_tuner.test_the_tuners_loss_is_the_models_own, ()),
}
ALL_CASES = CASES | MORE_CASES


def cases() -> list[tuple[str, str]]:
    """All of them, but what is refused; what costs most for one family of each kind of block."""
    one_each, costly = ("olmo2", "granite", "cohere", "falcon-serial"), ("frozen-mlps", "bits")
    return [
        (name, case)
        for name in MORE
        for case in ALL_CASES
        if not (name in OWN_ATTENTION and case in ("boost", "attention"))
        and not (case in costly and name not in one_each)
    ]


@pytest.mark.parametrize(("name", "case"), cases())
def test_as_every_family(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test, settings = ALL_CASES[case]
    test(name, *settings, *([monkeypatch] if case in ("lens", "loss") else []))


@pytest.mark.parametrize(
    ("name", "where"), [(n, w) for n in MORE for w in ("all", "end")[: 1 + (n not in OWN_ATTENTION)]]
)
def test_sets(name: str, where: str) -> None:
    check_sweep(name, where)


def test_baselines_of_scaled_writes() -> None:
    """What replaces an MLP's output is multiplied like it."""
    check_sweep("granite", "all", sweep_oracle.SETS[1:6], "mean")
    check_sweep("granite", "end", [("mlp", 0)], "mean")  # no row is left that computes it


def test_bf16() -> None:
    test_families.test_bf16("granite")


def test_modules_with_hooks_and_a_bias_behind_the_scale() -> None:
    """Not fused, and with logits of scale * (W_U x + bias)."""
    model, pairs = make("granite"), prompts((7, 5))
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, VOCAB, dtype=torch.float64))
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: None)
    with true_fp64():
        expected = literal_oracle.path_patch(model, pairs)
        result = pa.fast_patch(model, **inputs(pairs, expected.answers, "left"), log_probs=True, **QUIET)
    agree(result, expected)
    assert not result.settings["fused"]
    own = torch.from_numpy(expected.clean).log_softmax(-1)[torch.arange(2), torch.from_numpy(expected.answers)]
    np.testing.assert_allclose(result.clean_log_probs, own.numpy(), rtol=1e-12)


@pytest.mark.parametrize("name", ["gptj", "falcon"])
def test_what_needs_the_attention_interface_is_refused(name: str) -> None:
    model = make(name, torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    calls: dict[str, Any] = {
        "positions='end'": lambda: pa.ablation_sweep(model, ids, [1], positions="end"),
        "boost": lambda: pa.boost(model, [(0, 1)], source=[[0]], alpha=0.5),
        "attention_mass": lambda: attention_mass(model, ids, [(0, 1)], roles=ids),
    }
    for what, call in calls.items():
        with pytest.raises(UnsupportedModelError, match=f"{what}: family '{name}' .* outside transformers' Attention"):
            call()


@pytest.mark.parametrize("name", ["gptj", "falcon-new"])
def test_a_prefix_that_all_prompts_share(name: str) -> None:
    """Stored in a cache that goes by another name in these blocks."""
    test_families.test_prefixes(name, "few-shot")


def test_sdpa() -> None:
    test_families.test_sdpa("falcon-new")


@pytest.mark.parametrize("name", ["gptj", "falcon", "falcon-new", "gemma3"])
def test_generate_with_a_cache(name: str) -> None:
    test_ablation.test_generate_with_a_cache(name, "per position")


@pytest.mark.parametrize("name", ["gptj", "granite", "falcon-serial"])
def test_the_prefix_cache(name: str) -> None:
    test_prefix_cache.test_the_same_batches_give_the_same_bits(name, "eager", torch.float32)


@pytest.mark.parametrize("name", ["olmo2", "phi", "gptj", "cohere2"])
def test_packing(name: str) -> None:
    test_tuning_batches.test_packing_and_padding_are_exact_in_every_family(name, "eager")


def test_packing_is_refused_where_examples_see_each_other() -> None:
    """Falcon makes its mask without looking at positions."""
    model, examples = make("falcon", torch.float32), test_tuning_batches.examples_of(test_tuning_batches.LENGTHS)
    with pytest.raises(UnsupportedModelError, match="packing: FalconForCausalLM with attention 'eager' does not"):
        test_tuning_batches.check_isolated(model, model, examples, 2)


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi-plain": ("phi", {"qk_layernorm": False, "tie_word_embeddings": True}),
    "gptj-tied": ("gptj", {"tie_word_embeddings": True, "rotary_dim": 8}),
    "gemma3-no-cap": ("gemma3", {"final_logit_softcapping": None, "attention_bias": True}),
    "granite-cap-less": ("granite", {"residual_multiplier": 1.0, "mlp_bias": False}),
    "falcon-new-one-norm": ("falcon-new", {"num_ln_in_parallel_attn": 1, "bias": True}),
    "falcon-new-multi-head": ("falcon-new", {"num_kv_heads": 4, "parallel_attn": True}),
    "falcon-serial-multi-query": ("falcon-serial", {"multi_query": True, "bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_config_options(option: str) -> None:
    (name, settings), pairs = OPTIONS[option], prompts((6,), differ=(2, -1))
    model = make(name, **settings)
    with true_fp64():
        expected = literal_oracle.path_patch(model, pairs)
        agree(pa.fast_patch(model, **inputs(pairs, expected.answers, "left"), **QUIET), expected)


@pytest.mark.parametrize("name", ["cohere", "granite", "gptj"])
def test_foils_and_log_probs(name: str) -> None:
    """Scaled logits, and a bias of the unembedding, over the whole vocabulary."""
    test_families.test_foils_and_log_probs(name, "left")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("falcon", {"alibi": True}, "family 'falcon' with config.alibi is refused"),
        ("gemma3", {"use_bidirectional_attention": True}, "config.use_bidirectional_attention is refused"),
        ("granite", {"residual_multiplier": 0.0}, "positive number as config.residual_multiplier, got 0"),
        ("cohere", {"logit_scale": None}, "positive number as config.logit_scale, got None"),
    ],
)
def test_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        resolve(make(name, torch.float32, **settings))


def test_prompts_longer_than_the_table_of_positions() -> None:
    ids = torch.ones(1, 65, dtype=torch.int64)
    with pytest.raises(pa.errors.InputError, match="at most 64 tokens with rotary positions in a table"):
        pa.fast_patch(make("gptj", torch.float32), ids, 2 * ids, torch.tensor([1]))


@pytest.mark.parametrize(
    ("name", "attribute"), [("granite", "residual_multiplier"), ("cohere", "logit_multiplier"), ("phi", "parallel")]
)
def test_the_self_check_is_the_last_line(name: str, attribute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spec that leaves something out gives no result."""
    model = make(name)
    spec = FAMILIES[model.config.model_type]
    monkeypatch.setitem(FAMILIES, spec.name, type(spec)(**{**vars(spec), attribute: None}))
    with pytest.raises(SelfCheckError, match=f"family '{spec.name}'"):
        pa.fast_patch(model, **inputs(prompts(), [1, 2, 3], "left"), **QUIET)
