"""``fast_patch`` against the literal oracle: every family, both paddings, every prefix pattern."""

from __future__ import annotations

from functools import cache
from typing import Any

import literal_oracle
import numpy as np
import pytest
import tiny_models
import torch
from literal_oracle import Oracle
from single_thread import one_thread  # noqa: F401
from tiny_models import NAMES, SDPA, Prompt, inputs, make, prompts
from true_fp64 import true_fp64

import pyarith as pa

QUIET = {"progress": False, "verify": 0}
EXACT = {"rtol": 1e-12, "atol": 2e-12}  # logits are of order 5; both sides round at every layer
EQUAL = (7, 7, 7)


@cache
def truth(name: str, pairs: tuple[tuple[tuple[int, ...], ...], ...], mlps: str, attn: str) -> Oracle:
    """The oracle's answer, once per model and prompts: padding does not enter it."""
    model = make(name, attn=attn)
    rows = [Prompt(list(clean), list(corrupted)) for clean, corrupted in pairs]
    with true_fp64():
        return literal_oracle.path_patch(model, rows, mlps=mlps)


def oracle(name: str, pairs: list[Prompt], mlps: str = "recomputed", attn: str = "eager") -> Oracle:
    return truth(name, tuple((tuple(p.clean), tuple(p.corrupted)) for p in pairs), mlps, attn)


def agree(result: Any, expected: Oracle, tokens: np.ndarray | None = None, **tolerance: float) -> None:
    """All logits and all effects of a result are those of the oracle, which must not be trivial."""
    tolerance = tolerance or EXACT
    tokens = expected.answers if tokens is None else tokens
    heads, mlps, clean, corrupted = expected.at(tokens)
    assert np.abs(heads - clean).max() > 1e-2 and np.abs(mlps - clean).max() > 1e-2
    np.testing.assert_allclose(result.clean_logits, clean, **tolerance)
    np.testing.assert_allclose(result.corrupted_logits, corrupted, **tolerance)
    if result.head_logits is not None:
        np.testing.assert_allclose(result.head_logits, heads, **tolerance)
        np.testing.assert_allclose(result.head_effects, expected.effects(tokens)[0], **tolerance)
    if result.mlp_logits is not None:
        np.testing.assert_allclose(result.mlp_logits, mlps, **tolerance)
        np.testing.assert_allclose(result.mlp_effects, expected.effects(tokens)[1], **tolerance)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("mlps", ["recomputed", "frozen"])
@pytest.mark.parametrize("name", NAMES)
def test_exact(name: str, mlps: str, side: str) -> None:
    pairs = prompts(EQUAL if side == "none" else (7, 5, 9))
    expected = oracle(name, pairs, mlps)
    with true_fp64():
        result = pa.fast_patch(make(name), **inputs(pairs, expected.answers, side), mlps=mlps, **QUIET)
    assert result.head_logits.dtype == np.float64
    agree(result, expected)
    assert result.noise_floor.max() < 1e-12


@pytest.mark.parametrize("name", SDPA)
def test_sdpa(name: str) -> None:
    pairs = prompts()
    expected = oracle(name, pairs, attn="sdpa")
    for side in ("left", "right"):
        with true_fp64():
            result = pa.fast_patch(make(name, attn="sdpa"), **inputs(pairs, expected.answers, side), **QUIET)
        agree(result, expected)


@pytest.mark.parametrize("senders", [("heads",), ("mlps",)], ids=lambda s: s[0])
@pytest.mark.parametrize("name", ["llama-gqa2", "gemma2", "neox"])
def test_one_kind_of_sender(name: str, senders: tuple[str, ...]) -> None:
    pairs = prompts(EQUAL)
    expected = oracle(name, pairs)
    with true_fp64():
        result = pa.fast_patch(make(name), **inputs(pairs, expected.answers), senders=senders, **QUIET)
    absent, present = ("mlp", "head") if senders == ("heads",) else ("head", "mlp")
    assert getattr(result, f"{absent}_logits") is None and getattr(result, f"{absent}_effects") is None
    assert getattr(result, f"{present}_logits") is not None
    agree(result, expected)


# What clean, corrupted and the other prompts have in common at the start (lengths, shared by all, differ)
PREFIXES: dict[str, tuple[tuple[int, ...], int, Any]] = {
    "all-share": ((9, 9, 9), 5, (6, -1)),
    "all-share-long": ((13, 14, 12), 9, (-2,)),
    "pair-shares": ((8, 8, 8), 0, (5,)),
    "first-differs": ((6, 6, 6), 0, "first"),
    "end-differs": ((6, 7, 5), 2, "end"),
    "end-only-left": ((6, 6, 6), 5, "end"),
    "all-differ": ((5, 5, 5), 0, "all"),
    "one-token": ((1, 1, 1), 0, "first"),
    "some-one-token": ((1, 4, 2), 0, "end"),
    "very-unequal": ((3, 16, 8), 1, (1, -1)),
    # long enough for the engine to store the prefix that all prompts share
    "few-shot": ((21, 19, 23), 17, (18,)),
    "few-shot-end": ((19, 19, 19), 18, "end"),
    "few-shot-broken": ((21, 20, 22), 18, (3, -1)),
    "few-shot-twins": ((20, 20, 20, 26), 19, (-1,)),
    "batch-1": ((8,), 2, (4,)),
    "batch-1-long": ((21,), 20, (-1,)),
    "batch-1-end": ((4,), 3, "end"),
}


# two families meet every pattern, three more those that differ in how the engine stores and joins what is shared
FEW = ("some-one-token", "very-unequal", "few-shot", "few-shot-end", "batch-1-long")
MET = [(name, pattern) for pattern in PREFIXES for name in ("llama-gqa2", "gemma2")]
MET += [(name, pattern) for pattern in FEW for name in ("mistral", "gpt2", "neox")]


@pytest.mark.parametrize("name, pattern", MET)
def test_prefixes(name: str, pattern: str) -> None:
    lengths, shared, differ = PREFIXES[pattern]
    pairs = prompts(lengths, shared=shared, differ=differ, seed=4)
    expected = oracle(name, pairs)
    for side in ["left", "right"] + ["none"] * (len(set(lengths)) == 1):
        with true_fp64():
            result = pa.fast_patch(make(name), **inputs(pairs, expected.answers, side), **QUIET)
        heads, mlps, clean, corrupted = expected.at(expected.answers)
        np.testing.assert_allclose(result.head_logits, heads, err_msg=side, **EXACT)
        np.testing.assert_allclose(result.mlp_logits, mlps, err_msg=side, **EXACT)
        np.testing.assert_allclose(result.clean_logits, clean, err_msg=side, **EXACT)
        np.testing.assert_allclose(result.corrupted_logits, corrupted, err_msg=side, **EXACT)


MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "use_sliding_window": True}
WINDOWED: dict[str, dict[str, Any]] = {"mistral": {}, "gemma2": {}, "phi3": {}, "qwen2": MIXED, "qwen3": MIXED}


@pytest.mark.parametrize("window", [1, 2, 5, 18])
@pytest.mark.parametrize("name", WINDOWED)
def test_window_inside_a_shared_prefix(name: str, window: int) -> None:
    """Keys that slide out of the window while END still shares the prefix with every other prompt."""
    model = make(name, sliding_window=window, **WINDOWED[name])
    for pairs in (prompts((12, 10, 11), shared=7, differ=(-1, -2)), prompts((23, 20, 21), shared=18, differ=(-1, -2))):
        with true_fp64():
            expected = literal_oracle.path_patch(model, pairs)
            for side in ("left", "right"):
                agree(pa.fast_patch(model, **inputs(pairs, expected.answers, side), **QUIET), expected)


@pytest.mark.parametrize("name", SDPA)
def test_sdpa_few_shot(name: str) -> None:
    pairs = prompts((21, 19, 23), shared=17, differ=(18,), seed=4)
    expected = oracle(name, pairs, attn="sdpa")
    with true_fp64():
        result = pa.fast_patch(make(name, attn="sdpa"), **inputs(pairs, expected.answers, "left"), **QUIET)
    agree(result, expected)
    assert result.settings["prefix"] == 17


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_clean_and_corrupted_padded_differently(name: str) -> None:
    pairs = prompts()
    expected = oracle(name, pairs)
    for sides in (("left", "right"), ("right", "left"), ("none", "left")):
        rows = prompts(EQUAL) if "none" in sides else pairs
        expected = oracle(name, rows)
        given = tiny_models.batch(rows, *sides)._asdict()
        with true_fp64():
            result = pa.fast_patch(make(name), **given, answers=torch.tensor(expected.answers), **QUIET)
        agree(result, expected)


@pytest.mark.parametrize(
    "act", ["relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "gelu_10", "relu2", "tanh"]
)
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "neox"])
def test_activations(name: str, act: str) -> None:
    """Fused or not, gated or plain: the activation that the config names."""
    model, pairs = make(name, **{"activation_function" if name == "gpt2" else "hidden_act": act}), prompts((7,))
    with true_fp64():
        expected = literal_oracle.path_patch(model, pairs)
        agree(pa.fast_patch(model, **inputs(pairs, expected.answers), **QUIET), expected)


PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-inverse-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "neox-no-bias": ("neox", {"attention_bias": False}),
    "neox-tied": ("neox", {"tie_word_embeddings": True}),
    "phi3-partial": ("phi3", {"rope_parameters": PARTIAL_ROPE}),
    "gemma2-no-caps": ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    "gemma2-tied": ("gemma2", {"tie_word_embeddings": True}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "llama-head-dim": ("llama", {"head_dim": 12}),
    "llama-8-heads": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "llama-1-head": ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 33, "head_dim": 6}),
    "llama-1-layer": ("llama", {"num_hidden_layers": 1}),
    "neox-1-layer": ("neox", {"num_hidden_layers": 1}),
    "llama-odd-mlp": ("llama", {"intermediate_size": 7}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_config_options(option: str) -> None:
    (name, settings), pairs = OPTIONS[option], prompts(differ=(2, -1))
    model = make(name, **settings)
    with true_fp64():
        expected = literal_oracle.path_patch(model, pairs)
        agree(pa.fast_patch(model, **inputs(pairs, expected.answers, "left"), **QUIET), expected)


@pytest.mark.parametrize("name", ["llama-gqa2", "mistral", "gpt2"])
def test_attention_that_makes_its_own_mask(name: str) -> None:
    """A kernel unknown to the library (as flash attention is) gets plain prompts and their padding, no tree."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("of_this_test", sdpa_attention_forward)
    AttentionMaskInterface.register("of_this_test", sdpa_mask)
    for pairs in (prompts((7, 5, 9)), prompts((21, 19, 23), shared=17, differ=(18,))):
        expected = oracle(name, pairs, attn="sdpa")
        with true_fp64():
            result = pa.fast_patch(make(name, attn="of_this_test"), **inputs(pairs, expected.answers, "left"), **QUIET)
        agree(result, expected)
        assert result.settings["attention"] == "of_this_test"


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "neox-serial"])
def test_foils_and_log_probs(name: str, side: str) -> None:
    pairs = prompts(EQUAL if side == "none" else (7, 5, 9))
    expected = oracle(name, pairs)
    foils = torch.tensor([[1, 96, 4, 9], [0, 2, 50, 50], [3, 7, 1, 95]])
    with true_fp64():
        result = pa.fast_patch(
            make(name), **inputs(pairs, expected.answers, side), foils=foils, log_probs=True, **QUIET
        )
    agree(result, expected)
    for k in range(foils.shape[1]):
        heads, mlps, clean, _ = expected.at(foils[:, k].numpy())
        np.testing.assert_allclose(result.head_foil_logits[..., k], heads, **EXACT)
        np.testing.assert_allclose(result.mlp_foil_logits[..., k], mlps, **EXACT)
        np.testing.assert_allclose(result.clean_foil_logits[..., k], clean, **EXACT)
    rows = np.arange(len(pairs))
    for field in ("head", "mlp", "clean"):
        logits = torch.from_numpy({"head": expected.heads, "mlp": expected.mlps, "clean": expected.clean}[field])
        log_probs = logits.log_softmax(-1).numpy()[..., rows, expected.answers]
        np.testing.assert_allclose(getattr(result, f"{field}_log_probs"), log_probs, **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_fp32(name: str) -> None:
    """The default dtype, without any help: within 2e-5 of the fp64 truth, both paddings."""
    pairs = prompts()
    expected = oracle(name, pairs)
    for side in ("left", "right"):
        result = pa.fast_patch(make(name, torch.float32), **inputs(pairs, expected.answers, side), progress=False)
        assert result.head_logits.dtype == np.float32
        agree(result, expected, rtol=2e-5, atol=1e-4)
        # effects are differences against the identity row and so better than the logits themselves
        np.testing.assert_allclose(result.head_effects, expected.effects(expected.answers)[0], atol=1e-5)
        assert 0 <= result.noise_floor.max() < 1e-4 and result.verification_error < 1e-4


@pytest.mark.parametrize("name", ["llama-gqa2", "gemma2", "gpt2"])
def test_bf16(name: str) -> None:
    """Effects against a literal bf16 run: the same within a few times the error that bf16 itself makes."""
    pairs = prompts((7, 5, 9, 8), seed=9)
    model = make(name, torch.bfloat16)
    exact = model.double()
    with true_fp64():
        expected = literal_oracle.path_patch(exact, pairs)
    model = make(name, torch.bfloat16)
    literal = literal_oracle.path_patch(model, pairs)
    tokens = expected.answers
    result = pa.fast_patch(model, **inputs(pairs, tokens, "left"), progress=False)

    def rms(effects: np.ndarray) -> float:
        return float(np.sqrt(np.mean((effects - expected.effects(tokens)[0]) ** 2)))

    assert rms(result.head_effects) <= 1.5 * rms(literal.effects(tokens)[0]) + 1e-3
    assert np.abs(result.head_effects).max() > 5 * rms(result.head_effects)
    assert result.noise_floor.max() < 0.25
