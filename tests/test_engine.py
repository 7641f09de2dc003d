"""The engine's own parts: plans, layouts, shared prefixes, out of memory, self-checks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyarith as pa
from pyarith.engine import capture, oracle, planner, run
from pyarith.engine.batch import make_batch
from pyarith.engine.packing import causal, pack
from pyarith.engine.replay import Replay
from pyarith.errors import InputError, MemoryBudgetError, SelfCheckError
from pyarith.models.families import FAMILIES
from pyarith.models.sites import resolve

QUIET = {"progress": False, "verify": 0}


def pairs(n: int = 6, length: int = 20, same: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pairs that differ in the middle; the first ``same`` tokens are those of the first prompt everywhere."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(1, tiny_models.VOCAB, (n, length), generator=generator)
    clean[:, :same] = clean[0, :same]
    corrupted = clean.clone()
    at = max(same, length // 2)
    corrupted[:, at] = (corrupted[:, at] + 1) % tiny_models.VOCAB
    return {"clean": clean, "corrupted": corrupted, "answers": clean[:, -1].flip(0)}


def close(a: pa.PatchResult, b: pa.PatchResult, atol: float = 1e-5) -> None:
    for name, value in a._arrays().items():
        if name != "noise_floor":
            np.testing.assert_allclose(value, getattr(b, name), atol=atol, rtol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_models.make("llama", torch.float32)


# budgets and plans


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2**31), ("64 MiB", 2**26), ("1.5kB", 1500), (4096, 4096), (None, None)]
)
def test_bytes(text: object, size: int | None) -> None:
    assert planner.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["two", "2 parsecs", -1, 0, True, "nan"])
def test_bytes_refused(text: object) -> None:
    with pytest.raises(InputError, match="memory_budget"):
        planner.parse_bytes(text)


def make_planner(model: torch.nn.Module, n: int = 40, length: int = 20) -> planner.Planner:
    sites = resolve(model)
    batch = make_batch(sites, **pairs(n, length))
    replay = Replay(sites, "auto", heads=True, mlps=True, frozen=False, log_probs=False)
    return planner.Planner(sites, replay, batch, 0, True)


def test_plan_fits_and_covers(model: torch.nn.Module) -> None:
    plans = make_planner(model)
    smallest = plans.bytes(planner.Plan(1, 1, 1))
    for budget in (smallest, 2 * smallest, 5 * smallest, 10**9):
        plan = plans.plan(budget)
        assert plans.bytes(plan) <= budget
        groups = plans.groups(plan, torch.randperm(40))
        assert sorted(torch.cat([torch.cat(block) for block in groups]).tolist()) == list(range(40))
        assert max(len(torch.cat(block)) for block in groups) <= plan.prompts
    assert plans.plan(10**9).prompts == 40
    with pytest.raises(MemoryBudgetError, match=str(smallest)):
        plans.plan(smallest - 1)


def test_forecast_counts_what_the_model_does(model: torch.nn.Module) -> None:
    """Matrix-product FLOP against the floor's formula, less shared tokens, plus identity rows."""
    sites, n, length = resolve(model), 40, 20
    forecast = make_planner(model, n, length).forecast(planner.Plan(n, 2048, 512))
    d, d_mlp, layers, heads = 32, 44, sites.n_layers, sites.n_heads
    per_token = 2 * layers * (4 * d * d + 3 * d * d_mlp)
    norms = 2 * layers * 2 * d  # counted with the block's parameters
    tokens = n * (length + length // 2)
    last_mlp = 6 * d * d_mlp  # runs for END only
    assert forecast.capture_flop == tokens * (per_token + norms - last_mlp)
    rows = n * ((heads + 1) * layers * (layers + 1) // 2 + layers * (layers - 1) // 2)
    assert forecast.replay_flop == rows * 6 * d * d_mlp
    assert forecast.seconds > 0


# layouts


def test_the_rate_is_that_of_a_linear_layer() -> None:
    """Rows times a transposed weight: other layouts can be far slower in 16 bits, and the forecast with them."""
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:
                seen.append([tensor.stride() for tensor in args])
            return func(*args, **(kwargs or {}))

    planner.gemm_rate.cache_clear()
    with Products():
        assert planner.gemm_rate(torch.device("cpu"), torch.float64) > 0
    assert seen and all(x == (1024, 1) and weight == (1, 1024) for x, weight in seen)


def test_tree_mask_is_two_causal_prompts(model: torch.nn.Module) -> None:
    """Each end sees its own ancestors only: deleting the other branch leaves a plain causal mask."""
    batch = make_batch(resolve(model), **pairs(2, 8))
    for window in (None, 3):
        packed = pack(batch, torch.tensor([0, 1]), 0)
        allowed = packed.allowed(window)[0, 0]
        for branch in (1, 2):
            keep = (packed.branch[0] == 0) | (packed.branch[0] == branch)
            assert torch.equal(allowed[keep][:, keep], causal(8, window, torch.device("cpu"))[0, 0])
        assert not allowed[packed.branch[0] == 2][:, packed.branch[0] == 1].any()


def test_plain_layout_equals_trees(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = pairs(5, 20, same=4)
    trees = pa.fast_patch(model, **inputs, **QUIET)
    monkeypatch.setattr(capture, "_MASKED_ATTENTION", ())
    plain = pa.fast_patch(model, **inputs, **QUIET)
    close(trees, plain)


def tokens_through(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Tokens that went through the decoder in a run, the one-off self-check left out."""
    pa.fast_patch(model, **inputs, **QUIET)
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[:2].numel()))
    try:
        oracle._checked[model] = oracle._state(resolve(model))  # the hook above would have it checked again
        pa.fast_patch(model, **inputs, **QUIET)
    finally:
        handle.remove()
    return sum(seen)


def test_shared_tokens_are_computed_once(model: torch.nn.Module) -> None:
    assert tokens_through(model, pairs(6, 20)) == 6 * 30
    # 17 tokens of all prompts once, then per pair 3 of clean and 3 of corrupted
    assert tokens_through(model, pairs(6, 20, same=17)) == 17 + 6 * 6


@pytest.mark.parametrize("name", ["llama-gqa4", "mistral", "gemma2", "gpt2", "neox"])
def test_stored_prefix_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.make(name, torch.float32)
    inputs = pairs(5, 24, same=18)
    stored = pa.fast_patch(model, **inputs, **QUIET)
    assert stored.settings["prefix"] == 18
    monkeypatch.setattr(planner, "_MIN_PREFIX", 10**9)
    alone = pa.fast_patch(model, **inputs, **QUIET)
    assert alone.settings["prefix"] == 0
    close(stored, alone, atol=2e-5)


# out of memory


def test_out_of_memory_halves_and_goes_on(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = pairs(8, 12, same=2)
    whole = pa.fast_patch(model, **inputs, **QUIET)
    real = run.capture

    def tight(sites, batch, indices, *rest):  # type: ignore[no-untyped-def]
        if len(indices) > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")
        real(sites, batch, indices, *rest)

    monkeypatch.setattr(run, "capture", tight)
    halved = pa.fast_patch(model, **inputs, **QUIET)
    assert halved.settings["plan"]["prompts"] == 2
    close(whole, halved)


def test_out_of_memory_in_the_end_is_an_error(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(run, "capture", full)
    with pytest.raises(MemoryBudgetError, match="out of memory on cpu"):
        pa.fast_patch(model, **pairs(), **QUIET)


def test_other_errors_are_not_out_of_memory(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(run, "capture", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        pa.fast_patch(model, **pairs(), **QUIET)


# self-checks


@pytest.mark.parametrize(
    "wrong",
    [
        {"norm": "rms1p"},
        {"parallel": True},
        {"mlp_norm": "input_layernorm"},
        {"final_norm": "layers.0.input_layernorm"},
    ],
    ids=lambda w: next(iter(w)),
)
def test_wrong_family_spec_is_caught(wrong: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.make("llama", torch.float32)
    monkeypatch.setitem(FAMILIES, "llama", dataclasses.replace(FAMILIES["llama"], **wrong))
    with pytest.raises(SelfCheckError, match="family 'llama'"):
        pa.fast_patch(model, **pairs(), **QUIET)


def test_self_check_runs_again_after_a_change() -> None:
    model = tiny_models.make("llama", torch.float32)
    pa.fast_patch(model, **pairs(), **QUIET)
    handle = model.model.layers[1].register_forward_hook(lambda m, args, out: out + 1.0)
    with pytest.raises(SelfCheckError):
        pa.fast_patch(model, **pairs(), **QUIET)
    handle.remove()
    pa.fast_patch(model, **pairs(), **QUIET)


def test_verification_catches_one_wrong_head(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Replay.run

    def wrong(self, captured, targets, row_block):  # type: ignore[no-untyped-def]
        rows = real(self, captured, targets, row_block)
        rows.logits[2] += 0.05  # head 0.2
        return rows

    pa.fast_patch(model, **pairs(), **QUIET)  # attached: only verification is left to notice
    monkeypatch.setattr(Replay, "run", wrong)
    with pytest.raises(SelfCheckError, match=r"head 0\.2"):
        pa.fast_patch(model, **pairs(), progress=False, verify=tiny_models.make("llama").config.num_attention_heads * 6)


def test_verification_reports_its_error(model: torch.nn.Module) -> None:
    result = pa.fast_patch(model, **pairs(), progress=False, verify=4)
    assert result.verification_error is not None and result.verification_error < 1e-4
    assert pa.fast_patch(model, **pairs(), **QUIET).verification_error is None


# results


def test_ranking_and_key_heads(model: torch.nn.Module) -> None:
    result = pa.fast_patch(model, **pairs(), **QUIET)
    effects = result.head_effects
    assert effects is not None
    top = result.top(3)
    assert [row.effect for row in top] == sorted(effects.flatten())[:3]
    assert top[0].effect == effects[top[0].head]
    assert set(result.key_heads(-0.05)) == {pa.Head(*index) for index in np.argwhere(effects < -0.05).tolist()}
    with pytest.raises(InputError, match="senders"):
        pa.fast_patch(model, **pairs(), senders=("mlps",), **QUIET).top()


def test_merge_keeps_order_and_batches(model: torch.nn.Module) -> None:
    inputs = pairs(7, 12)
    whole = pa.fast_patch(model, **inputs, foils=inputs["clean"][:, :2], log_probs=True, **QUIET)
    foils = inputs["clean"][:, :2]
    parts = [{**{k: v[at] for k, v in inputs.items()}, "foils": foils[at]} for at in (slice(0, 3), slice(3, 7))]
    merged = pa.fast_patch(model, parts, log_probs=True, **QUIET)
    close(whole, merged)
    assert len(merged.settings["parts"]) == 2
