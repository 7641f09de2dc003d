"""Errors found in other tools, each as a test that a library with that error fails."""

from __future__ import annotations

import literal_oracle
import numpy as np
import pytest
import torch
from literal_oracle import Sites
from single_thread import one_thread  # noqa: F401
from tiny_models import inputs, make, prompts
from true_fp64 import true_fp64

import pyarith as pa

QUIET = {"progress": False, "verify": 0}
TIGHT = {"rtol": 1e-12, "atol": 2e-12}


def test_two_digit_layers() -> None:
    """Layer numbers read as one digit turn layer 10 into layer 1 or into nothing (path_patching)."""
    model, pairs = make("llama", num_hidden_layers=12, num_attention_heads=2, num_key_value_heads=2), prompts((6,))
    with true_fp64():
        expected = literal_oracle.path_patch(model, pairs)
        result = pa.fast_patch(model, **inputs(pairs, expected.answers), **QUIET)
    np.testing.assert_allclose(result.head_logits, expected.at(expected.answers)[0], **TIGHT)
    assert np.abs(result.head_effects[10:]).min() > 1e-6
    keys = result.key_heads(float(result.head_effects[11].max()) + 1e-9)
    assert any(layer >= 10 for layer, _ in keys) and str(pa.Head(11, 1)) == "11.1"


def test_heads_are_sliced_before_the_projection() -> None:
    """Slicing the projection's *output* by head patches d_head of d_model dimensions (nnsight's pattern)."""
    model, pairs = make("llama"), prompts((7,))
    site = Sites.of(model).outs[1]
    with true_fp64():
        clean, corrupted = (literal_oracle.forward(model, ids) for ids in pairs[0])
        expected = literal_oracle.path_patch(model, pairs)
        result = pa.fast_patch(model, **inputs(pairs, expected.answers), **QUIET)
        with torch.no_grad():
            out = site(clean.z[1]).clone()
            out[..., 8:16] = site(corrupted.z[1])[..., 8:16]
            hook = site.register_forward_hook(lambda *_: out)
            wrong = literal_oracle.forward(model, pairs[0].clean, z=dict(enumerate(clean.z))).logits
            hook.remove()
    right = expected.heads[1, 1, 0]
    answer = expected.answers[0]
    assert abs(wrong[answer] - right[answer]) > 1e-3
    assert abs(result.head_logits[1, 1, 0] - right[answer]) < 1e-12


@pytest.mark.parametrize("name", ["llama-gqa2", "llama-gqa4", "qwen3"])
def test_gqa_heads_are_query_heads(name: str) -> None:
    """Under GQA there is one row per query head, and heads of one group differ (TransformerLens #980)."""
    pairs = prompts((7, 7))
    result = pa.fast_patch(make(name), **inputs(pairs, [1, 2]), **QUIET)
    assert result.head_logits.shape[1] == 4
    assert np.abs(np.diff(result.head_logits, axis=1)).min() > 1e-7


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_norm_scale_is_not_frozen(name: str) -> None:
    """Direct attribution with the clean norm's scale is off by far more than rounding (TransformerLens 3)."""
    model, pairs = make(name), prompts((7,), differ="all", shared=0)
    norm, sites = (model.model.norm if name == "llama" else model.transformer.ln_f), Sites.of(model)
    seen = []
    hook = norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0, -1]))
    with true_fp64(), torch.no_grad():
        clean, corrupted = (literal_oracle.forward(model, ids) for ids in pairs[0])
        hook.remove()
        expected = literal_oracle.path_patch(model, pairs, mlps="frozen")
        result = pa.fast_patch(model, **inputs(pairs, expected.answers), mlps="frozen", **QUIET)
        row = seen[0]
        centred = row - row.mean() if name == "gpt2" else row
        scale = (centred.square().mean() + 1e-5).rsqrt()
        dz = torch.zeros_like(clean.z[2][0, -1])
        dz[:8] = (corrupted.z[2] - clean.z[2])[0, -1, :8]
        write = dz @ sites.outs[2].weight if name == "gpt2" else sites.outs[2].weight @ dz
        write = write - write.mean() if name == "gpt2" else write
        unembed = model.get_output_embeddings().weight[int(expected.answers[0])]
        linear = float(result.clean_logits[0] + (write * scale * norm.weight) @ unembed)
    np.testing.assert_allclose(result.head_logits, expected.at(expected.answers)[0], **TIGHT)
    change = result.head_logits[2, 0, 0] - result.clean_logits[0]
    assert abs(linear - result.head_logits[2, 0, 0]) > 0.02 * abs(change) > 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_patches_are_not_ignored_in_a_batch(side: str) -> None:
    """Batched patching that silently did nothing (nnsight #502): every sender of every prompt moves its logit."""
    pairs = prompts((7, 5, 9, 6), shared=0, differ="all")
    for senders in (("heads",), ("mlps",), ("heads", "mlps")):
        result = pa.fast_patch(make("llama-gqa2"), **inputs(pairs, [1, 2, 3, 4], side), senders=senders, **QUIET)
        for logits in (result.head_logits, result.mlp_logits):
            if logits is not None:
                moved = np.abs(logits - result.clean_logits)
                assert moved.min() > 1e-6


def test_effects_differ_from_sender_to_sender() -> None:
    """Scores after the first that are all equal, because state leaked from one patch to the next (EAP-IG)."""
    result = pa.fast_patch(make("llama"), **inputs(prompts(), [1, 2, 3], "left"), **QUIET)
    values = np.concatenate([result.head_logits[..., 0].ravel(), result.mlp_logits[..., 0].ravel()])
    assert np.diff(np.sort(values)).min() > 1e-9


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_position_ids_under_padding(name: str, side: str) -> None:
    """GPT-2's learned positions start at the first real token, however many pads stand before it."""
    model, pairs = make(name), prompts((8, 4))
    with true_fp64():
        alone = [literal_oracle.forward(model, pair.clean).logits for pair in pairs]
        tokens = [int(logits.argmax()) for logits in alone]
        result = pa.fast_patch(model, **inputs(pairs, tokens, side), **QUIET)
    np.testing.assert_allclose(result.clean_logits, [a[t] for a, t in zip(alone, tokens, strict=True)], **TIGHT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_are_never_read(side: str) -> None:
    """Other ids under the mask change nothing, not even the last bit."""
    given = inputs(prompts(), [1, 2, 3], side)
    first = pa.fast_patch(make("llama"), **given, **QUIET)
    for ids in ("clean", "corrupted"):
        given[ids] = torch.where(given["attention_mask"].bool(), given[ids], 77)
    second = pa.fast_patch(make("llama"), **given, **QUIET)
    np.testing.assert_array_equal(first.head_logits, second.head_logits)
    np.testing.assert_array_equal(first.mlp_logits, second.mlp_logits)


def test_end_is_the_last_real_token() -> None:
    """Reading position -1 under right padding reads a pad."""
    model, pairs = make("llama"), prompts((8, 4))
    given = inputs(pairs, [1, 2], "right")
    mask = given["attention_mask"]
    with true_fp64(), torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=given["clean"], attention_mask=mask, position_ids=positions).logits
        result = pa.fast_patch(model, **given, **QUIET)
    rows = torch.arange(2)
    right, wrong = logits[rows, mask.sum(-1) - 1, torch.tensor([1, 2])], logits[:, -1][rows, torch.tensor([1, 2])]
    np.testing.assert_allclose(result.clean_logits, right, **TIGHT)
    assert np.abs(result.clean_logits - wrong.numpy()).min() > 1e-3


def test_mlps_answer_to_the_patch_by_default() -> None:
    """The default recomputes later MLPs (Wang et al.); the frozen variant is named in the result."""
    model, pairs = make("llama"), prompts((7, 7))
    with true_fp64():
        expected = literal_oracle.path_patch(model, pairs, mlps="recomputed")
        result = pa.fast_patch(model, **inputs(pairs, expected.answers), **QUIET)
        frozen = pa.fast_patch(model, **inputs(pairs, expected.answers), mlps="frozen", **QUIET)
    np.testing.assert_allclose(result.head_logits, expected.at(expected.answers)[0], **TIGHT)
    assert "recomputed" in result.semantics and "frozen" in frozen.semantics


@pytest.mark.parametrize("name", ["qwen2", "llama-gqa2", "gpt2", "neox"])
def test_output_bias_is_kept(name: str) -> None:
    """An adapter that drops the layer's bias (peft's trainable tokens): the identity rows would show it."""
    model = make(name)
    for module in Sites.of(model).outs:
        if module.bias is not None:
            with torch.no_grad():
                module.bias.mul_(20)
    with true_fp64():
        result = pa.fast_patch(model, **inputs(prompts(), [1, 2, 3], "left"), **QUIET)
    assert result.noise_floor.max() < 1e-12


def test_other_heads_are_frozen() -> None:
    """Path patching is not activation patching: with nothing frozen the numbers are others."""
    model, pairs = make("llama"), prompts((7,))
    with true_fp64():
        clean, corrupted = (literal_oracle.forward(model, ids) for ids in pairs[0])
        z = clean.z[0].clone()
        z[..., :8] = corrupted.z[0][..., :8]
        plain = literal_oracle.forward(model, pairs[0].clean, z={0: z}).logits
        expected = literal_oracle.path_patch(model, pairs)
        result = pa.fast_patch(model, **inputs(pairs, expected.answers), **QUIET)
    assert abs(result.head_logits[0, 0, 0] - plain[expected.answers[0]]) > 1e-3
    np.testing.assert_allclose(result.head_logits[0, 0, 0], expected.heads[0, 0, 0, expected.answers[0]], **TIGHT)


def test_effects_are_averaged_after_the_sign() -> None:
    """Effects of opposite sign cancel in the mean: no absolute value is taken before averaging."""
    result = pa.fast_patch(make("llama"), **inputs(prompts((6, 6, 6)), [1, 2, 3]), **QUIET)
    per_prompt = (result.head_logits - result.identity_logits[:, None]) / result.clean_logits
    good = result.clean_logits > 0
    np.testing.assert_allclose(result.head_effects, per_prompt[..., good].mean(-1), rtol=1e-9, atol=1e-12)
    assert (per_prompt > 0).any() and (per_prompt < 0).any()
