"""``ablation_sweep`` against one hooked forward pass per set and prompt, for every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from single_thread import one_thread  # noqa: F401
from sweep_oracle import (
    BASELINES,
    EXACT,
    POSITIONS,
    QUIET,
    SETS,
    agree,
    answers,
    given,
    reference,
    rows,
    short,
    single_heads,
    truth,
)
from tiny_models import NAMES, SDPA, make
from true_fp64 import true_fp64

import pyarith as pa

# one of each layout of heads, norms and blocks meets every baseline, the others zero and one that reads values
MAIN = ("llama-gqa2", "gemma2", "gpt2", "neox")
MET = [(name, kind) for name in NAMES for kind in (BASELINES if name in MAIN else ("zero", "mean-per-position"))]


@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("name, kind", MET)
def test_exact(name: str, kind: str, where: str) -> None:
    """All families, baselines and positions, both paddings: every head alone, and sets of several sites."""
    model = make(name)
    baseline, full = truth(name, kind, where)
    n = len(single_heads(model))
    for side in ("left", "right"):
        with true_fp64():
            alone = pa.ablation_sweep(
                model, **given(rows(), side), baseline=baseline, positions=where, predictions=True, **QUIET
            )
            together = pa.ablation_sweep(
                model, **given(rows(), side), sets=SETS, baseline=baseline, positions=where, **QUIET
            )
        agree(alone, full[: n + 1])
        agree(together, full[[0, *range(n + 1, len(full))]])
        assert alone.logits.dtype == np.float64 and alone.noise_floor < 1e-12
        np.testing.assert_array_equal(alone.predictions, full[1 : n + 1].argmax(-1).numpy())
        np.testing.assert_array_equal(alone.clean_predictions, full[0].argmax(-1).numpy())
        assert together.predictions is None
    assert [s.heads[0] for s in alone.sets] == single_heads(model)


@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("name", SDPA)
def test_sdpa(name: str, where: str) -> None:
    baseline, full = truth(name, "mean", where, "sdpa")
    with true_fp64():
        result = pa.ablation_sweep(
            make(name, attn="sdpa"),
            **given(rows()),
            sets=[*single_heads(make(name)), *SETS],
            baseline=baseline,
            positions=where,
            **QUIET,
        )
    agree(result, full)


@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "phi3", "qwen3"])
def test_sliding_windows(name: str, window: int, where: str) -> None:
    mixed = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "use_sliding_window": True}
    model = make(name, sliding_window=window, **(mixed if name == "qwen3" else {}))
    ids = rows((12, 8))
    with true_fp64():
        expected = reference(model, ids, SETS, pa.ZeroAblation(), where)
        agree(pa.ablation_sweep(model, **given(ids), sets=SETS, positions=where, **QUIET), expected)


@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("lengths", [(1,), (1, 1), (1, 6), (2, 1, 9)])
def test_short_prompts(lengths: tuple[int, ...], where: str) -> None:
    """One-token prompts, a batch of one: nothing before END, nothing to broadcast over."""
    for name in MAIN:
        model, ids = make(name), rows(lengths) if min(lengths) > 1 else short(lengths)
        with true_fp64():
            expected = reference(model, ids, SETS, pa.ZeroAblation(), where)
            result = pa.ablation_sweep(model, **given(ids), sets=SETS, positions=where, **QUIET)
        np.testing.assert_allclose(
            result.logits, expected[1:, torch.arange(len(ids)), answers(len(ids))].numpy(), **EXACT
        )


@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_foils(name: str, where: str) -> None:
    foils = torch.tensor([[1, 96, 4]] * len(rows()))
    _, full = truth(name, "zero", where)
    with true_fp64():
        result = pa.ablation_sweep(make(name), **given(rows()), foils=foils, positions=where, **QUIET)
    n = len(result.sets)
    np.testing.assert_allclose(result.foil_logits, full[1 : n + 1][..., foils[0]].numpy(), **EXACT)
    np.testing.assert_allclose(result.clean_foil_logits, full[0][:, foils[0]].numpy(), **EXACT)
    np.testing.assert_allclose(result.identity_foil_logits, full[0][:, foils[0]].numpy(), **EXACT)


@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("name", NAMES)
def test_fp32(name: str, where: str) -> None:
    _, full = truth(name, "zero", where)
    model = make(name, torch.float32)
    result = pa.ablation_sweep(
        model, **given(rows()), sets=[*single_heads(model), *SETS], positions=where, progress=False
    )
    assert result.logits.dtype == np.float32
    agree(result, full, rtol=2e-5, atol=1e-4)
    assert result.verification_error < 1e-4 and result.noise_floor < 1e-4


@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("name", MAIN)
def test_bf16(name: str, where: str) -> None:
    """Changes against a literal bf16 run: not worse than what bf16 itself does to them."""
    model = make(name, torch.bfloat16)
    sets = [*single_heads(model), *SETS]
    with true_fp64():
        exact = reference(make(name, torch.bfloat16).double(), rows(), sets, pa.ZeroAblation(), where)
    literal = reference(model, rows(), sets, pa.ZeroAblation(), where).double()
    result = pa.ablation_sweep(model, **given(rows()), sets=sets, positions=where, progress=False)
    n = len(rows())
    change = [(f[1:] - f[0])[:, torch.arange(n), answers(n)].numpy() for f in (exact, literal)]

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean((x - change[0]) ** 2)))

    assert rms(result.changes) <= 1.5 * rms(change[1]) + 1e-3
    assert np.abs(result.changes).max() > 5 * rms(result.changes)
