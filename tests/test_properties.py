"""Properties that hold whatever the weights: batches, order, blocks, repeats, silent and equal senders."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import literal_oracle
import numpy as np
import pytest
import torch
from single_thread import one_thread  # noqa: F401
from tiny_models import Prompt, inputs, make, prompts
from true_fp64 import true_fp64

import pyarith as pa

QUIET = {"progress": False, "verify": 0}
TIGHT = {"rtol": 1e-12, "atol": 2e-12}
PER_PROMPT = ("head_logits", "mlp_logits", "clean_logits", "corrupted_logits", "identity_logits")
SOME = ["llama-gqa2", "gemma2", "gpt2", "neox"]


def answers_of(model: torch.nn.Module, pairs: list[Prompt]) -> torch.Tensor:
    """The token the clean model prefers."""
    return torch.stack([literal_oracle.forward(model, pair.clean).logits.argmax() for pair in pairs])


def run(name: str, pairs: list[Prompt], side: str = "left", **options: Any) -> Any:
    """One exact call in fp64."""
    model = options.pop("model", None) or make(name)
    with true_fp64():
        return pa.fast_patch(model, **inputs(pairs, answers_of(model, pairs), side), **{**QUIET, **options})


def same(a: Any, b: Any, order: Any = slice(None), **tolerance: float) -> None:
    """Every per-prompt field of ``a`` is that of ``b`` with its prompts in ``order``."""
    for field in PER_PROMPT:
        np.testing.assert_allclose(
            getattr(a, field), getattr(b, field)[..., order], err_msg=field, **(tolerance or TIGHT)
        )


@pytest.mark.parametrize("name", SOME)
def test_alone_as_in_a_batch(name: str) -> None:
    pairs = prompts()
    together = run(name, pairs)
    for i, pair in enumerate(pairs):
        same(run(name, [pair], side="none"), together, [i])


@pytest.mark.parametrize("name", SOME)
def test_order_of_prompts(name: str) -> None:
    pairs, order = prompts((7, 5, 9, 6)), [2, 0, 3, 1]
    shuffled, straight = run(name, [pairs[i] for i in order]), run(name, pairs)
    same(shuffled, straight, order)
    np.testing.assert_allclose(shuffled.head_effects, straight.head_effects, **TIGHT)


@pytest.mark.parametrize("name", SOME)
def test_batches_are_merged(name: str) -> None:
    """Batches of different length, size and padding side, given as a list or as a generator."""
    pairs = prompts((7, 5, 9, 6, 8))
    model = make(name)
    tokens = answers_of(model, pairs)
    parts = [([0, 1], "left"), ([2], "none"), ([3, 4], "right")]
    batches = [inputs([pairs[i] for i in rows], tokens[rows], side) for rows, side in parts]
    whole = run(name, pairs)
    with true_fp64():
        for given in (batches, iter(batches), (b for b in batches)):
            merged = pa.fast_patch(model, given, **QUIET)
            same(merged, whole)
            for field in ("head_effects", "mlp_effects"):
                np.testing.assert_allclose(getattr(merged, field), getattr(whole, field), **TIGHT)


def test_merged_noise_floor_is_the_worst() -> None:
    model, parts = make("llama-gqa2", torch.bfloat16), [inputs([pair], [5]) for pair in prompts((6, 7, 8))]
    floors = np.stack([pa.fast_patch(model, **part, **QUIET).noise_floor for part in parts])
    merged = pa.fast_patch(model, parts, **QUIET)
    assert np.ptp(floors, axis=0).max() > 0
    np.testing.assert_array_equal(merged.noise_floor, floors.max(0))


def test_batches_with_foils() -> None:
    pairs, model = prompts((6, 6, 6)), make("llama")
    tokens, foils = answers_of(model, pairs), torch.tensor([[1, 2], [3, 4], [5, 6]])
    batches = [
        {**inputs(pairs[:2], tokens[:2]), "foils": foils[:2]},
        {**inputs(pairs[2:], tokens[2:]), "foils": foils[2:]},
    ]
    with true_fp64():
        merged = pa.fast_patch(model, batches, log_probs=True, **QUIET)
    whole = run("llama", pairs, side="none", foils=foils, log_probs=True)
    np.testing.assert_allclose(merged.head_foil_logits, whole.head_foil_logits, **TIGHT)
    np.testing.assert_allclose(merged.head_log_probs, whole.head_log_probs, **TIGHT)


def smallest_budget(model: torch.nn.Module, given: dict[str, Any], **options: Any) -> int:
    """The number that the error for a budget of one byte names."""
    with pytest.raises(pa.errors.MemoryBudgetError) as caught:
        pa.fast_patch(model, **given, memory_budget=1, **QUIET, **options)
    return int(re.search(r"at least ([\d_,]+) bytes", str(caught.value))[1].replace(",", ""))


@pytest.mark.parametrize("name", SOME)
def test_blocks_do_not_matter(name: str) -> None:
    """Budgets from the smallest that works upward cut the work into ever larger blocks."""
    pairs, model = prompts((7, 5, 9, 6)), make(name)
    given = inputs(pairs, answers_of(model, pairs), "left")
    with true_fp64():
        whole = pa.fast_patch(model, **given, log_probs=True, **QUIET)
        least = smallest_budget(model, given, log_probs=True)
        for budget in (least, int(1.5 * least), 3 * least, "1GiB"):
            cut = pa.fast_patch(model, **given, log_probs=True, memory_budget=budget, **QUIET)
            same(cut, whole)
            np.testing.assert_allclose(cut.head_log_probs, whole.head_log_probs, **TIGHT)
            np.testing.assert_allclose(cut.noise_floor, 0, atol=1e-12)
            assert cut.settings["plan"]["prompts"] == (1 if budget == least else cut.settings["plan"]["prompts"])
        assert cut.settings["plan"]["prompts"] == len(pairs)


@pytest.mark.parametrize("name", ["llama-gqa2", "neox"])
def test_out_of_memory_halves_the_blocks(name: str) -> None:
    """A device that holds two pairs at a time: the run goes on with smaller blocks and gives the same."""
    pairs, model = prompts((6, 6, 6, 6, 6), shared=0), make(name)
    whole = run(name, pairs, side="none")
    calls = []

    def small_device(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        calls.append(len(args[0]))
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (of this test)")

    site = model.get_submodule(
        "model.layers.1.self_attn.q_proj" if "llama" in name else "gpt_neox.layers.1.attention.query_key_value"
    )
    site.register_forward_pre_hook(small_device)
    same(run(name, pairs, side="none", model=model), whole)
    assert max(calls) == 5 and calls.count(2) >= 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_repeats_bitwise(dtype: torch.dtype) -> None:
    model, pairs = make("llama-gqa2", dtype), prompts()
    given = inputs(pairs, [1, 2, 3], "left")
    first = pa.fast_patch(model, **given, **QUIET)
    for _ in range(10):
        again = pa.fast_patch(model, **given, **QUIET)
        for field in (*PER_PROMPT, "head_effects", "mlp_effects", "noise_floor"):
            np.testing.assert_array_equal(getattr(again, field), getattr(first, field), err_msg=field)


@pytest.mark.parametrize("name", SOME)
def test_effect_is_against_the_identity_row(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        pairs, model = prompts((7, 5, 9)), make(name, dtype)
        result = pa.fast_patch(model, **inputs(pairs, answers_of(model, pairs), "left"), **QUIET)
        clean = result.clean_logits.astype(np.float64)
        assert np.all(clean > 0)
        for kind, identity in (("head", result.identity_logits), ("mlp", result.mlp_identity_logits)):
            patched = getattr(result, f"{kind}_logits").astype(np.float64)
            own = identity.astype(np.float64)[(slice(None), *[None] * (patched.ndim - 2))]
            expected = ((patched - own) / clean).mean(-1)
            np.testing.assert_allclose(getattr(result, f"{kind}_effects"), expected, rtol=1e-4, atol=1e-6)
        floor = np.abs(result.identity_logits - clean).max(-1)
        np.testing.assert_allclose(result.noise_floor, floor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SOME)
def test_fp64_has_no_noise(name: str) -> None:
    result = run(name, prompts(), verify=3)
    assert result.noise_floor.shape == (result.head_logits.shape[0],)
    assert result.noise_floor.max() < 1e-12 and result.verification_error < 1e-12


@pytest.mark.parametrize("name", SOME)
def test_sender_that_does_not_change(name: str) -> None:
    """Corrupted ids that embed as the clean ones leave every z and MLP output as it was: all effects 0."""
    model, pairs = make(name), prompts((6, 6), seed=8)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        for pair in pairs:
            for clean, corrupted in zip(pair.clean, pair.corrupted, strict=True):
                table[corrupted] = table[clean]
    result = run(name, pairs, side="none", model=model)
    np.testing.assert_allclose(result.head_effects, 0, atol=1e-12)
    np.testing.assert_allclose(result.mlp_effects, 0, atol=1e-12)
    np.testing.assert_allclose(result.corrupted_logits, result.clean_logits, **TIGHT)


@pytest.mark.parametrize("name", ["llama-gqa2", "qwen3", "phi3", "gemma2"])
def test_head_without_output_weights(name: str) -> None:
    """Columns of W_O at 0 silence exactly that head."""
    model = make(name)
    out = model.model.layers[1].self_attn.o_proj.weight
    d_head = out.shape[1] // 4
    with torch.no_grad():
        out[:, 2 * d_head : 3 * d_head] = 0
    result = run(name, prompts(), model=model)
    silent = np.zeros(result.head_effects.shape, dtype=bool)
    silent[1, 2] = True
    assert np.abs(result.head_effects[silent]).max() < 1e-13
    assert np.abs(result.head_effects[~silent]).min() > 1e-7


@pytest.mark.parametrize("name", SOME)
def test_everywhere_equals_end_only(name: str) -> None:
    """The library patches END; a literal patch at all positions gives the same."""
    pairs, model = prompts((7, 7, 7)), make(name)
    with true_fp64():
        everywhere = literal_oracle.path_patch(model, pairs, where="all")
    heads, mlps, *_ = everywhere.at(answers_of(model, pairs).numpy())
    result = run(name, pairs, side="none")
    np.testing.assert_allclose(result.head_logits, heads, **TIGHT)
    np.testing.assert_allclose(result.mlp_logits, mlps, **TIGHT)


@pytest.mark.parametrize("name", SOME)
def test_frozen_is_another_quantity(name: str) -> None:
    recomputed, frozen = run(name, prompts()), run(name, prompts(), mlps="frozen")
    assert np.abs(recomputed.head_effects - frozen.head_effects).max() > 1e-3
    assert recomputed.semantics != frozen.semantics
    # nothing lies after the last MLP, so there the two agree
    np.testing.assert_allclose(recomputed.mlp_logits[-1], frozen.mlp_logits[-1], **TIGHT)


def test_negative_clean_logits_are_left_out() -> None:
    """A prompt with clean logit <= 0 counts in no mean; with none left the mean is NaN, and that is said."""
    pairs, model = prompts((6, 6, 6)), make("llama")
    tokens = answers_of(model, pairs)
    tokens[1] = literal_oracle.forward(model, pairs[1].clean).logits.argmin()
    given = inputs(pairs, tokens)
    with true_fp64():
        result = pa.fast_patch(model, **given, **QUIET)
        without = pa.fast_patch(model, **inputs([pairs[0], pairs[2]], tokens[[0, 2]]), **QUIET)
        assert result.clean_logits[1] < 0
        np.testing.assert_allclose(result.head_effects, without.head_effects, **TIGHT)
        with pytest.warns(RuntimeWarning, match="clean"):
            nothing = pa.fast_patch(model, **inputs([pairs[1]], tokens[[1]]), **QUIET)
            assert np.isnan(nothing.head_effects).all() and np.isnan(nothing.mlp_effects).all()
            assert nothing.key_heads() == []
    assert np.isfinite(nothing.head_logits).all()


def test_save_and_load(tmp_path: Path) -> None:
    foils = torch.tensor([[1, 2], [3, 4], [5, 6]])
    for options in ({}, {"senders": ("heads",)}, {"foils": foils, "log_probs": True}):
        result = run("llama", prompts(), **options)
        place = tmp_path / str(len(options))
        result.save(place)
        loaded = type(result).load(place)
        for field in result.__dataclass_fields__:
            old, new = getattr(result, field), getattr(loaded, field)
            if isinstance(old, np.ndarray):
                assert old.dtype == new.dtype
                np.testing.assert_array_equal(old, new, err_msg=field)
            else:
                assert old == new, field
        assert loaded.top(3) == result.top(3) and loaded.key_heads() == result.key_heads()
        assert not list(place.rglob("*.pkl")) and not list(place.rglob("*.pt"))


def test_result_is_frozen_and_ranked() -> None:
    result = run("llama-gqa2", prompts())
    with pytest.raises(FrozenInstanceError):
        result.head_effects = None
    order = np.argsort(result.head_effects, axis=None)
    threshold = float(result.head_effects.flat[order[3]]) + 1e-9
    expected = [divmod(int(i), 4) for i in order[:4] if result.head_effects.flat[i] < threshold]
    assert [tuple(head) for head in result.key_heads(threshold)] == expected
    assert repr(result)
