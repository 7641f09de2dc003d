"""Runs of ``ablation_sweep``: blocks and budgets, out of memory, self-checks, bad input, results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from sweep_oracle import LENGTHS, POSITIONS, QUIET, SETS, agree, answers, given, rows, single_heads, truth
from tiny_models import NAMES, make, pad
from torch.utils.flop_counter import FlopCounterMode
from true_fp64 import true_fp64

import pyarith as pa
from pyarith import ops
from pyarith.engine import sweep, sweep_end, sweep_layers, sweep_run
from pyarith.engine.sweep_layers import Carrier
from pyarith.engine.sweep_plan import SweepPlan, SweepPlanner
from pyarith.errors import InputError, InputTypeError, MemoryBudgetError, NonFiniteError, SelfCheckError
from pyarith.models.families import FAMILIES
from pyarith.prompts import PromptPairs

# blocks


@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("plan", [(1, 1, 1), (2, 3, 20), (6, 4, 1000), (4, 100, 9), (6, 1, 7)])
def test_blocks_change_nothing(plan: tuple[int, int, int], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SweepPlanner, "plan", lambda self, budget: SweepPlan(*plan))
    for name, kind in (("llama-gqa2", "resample"), ("gemma2", "mean-per-position"), ("neox", "mean")):
        baseline, full = truth(name, kind, where)
        model = make(name)
        with true_fp64():
            result = pa.ablation_sweep(
                model,
                **given(rows()),
                sets=[*single_heads(model), *SETS],
                baseline=baseline,
                positions=where,
                predictions=True,
                **QUIET,
            )
        agree(result, full)
        np.testing.assert_array_equal(result.predictions, full[1:].argmax(-1).numpy())


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return make("llama-gqa2", torch.float32)


@pytest.mark.parametrize("where", POSITIONS)
def test_budget(model: torch.nn.Module, where: str) -> None:
    whole = pa.ablation_sweep(model, **given(rows()), positions=where, **QUIET)
    planner = whole.settings["forecast"]["bytes"]
    for budget in (planner, planner // 3, planner // 6):
        result = pa.ablation_sweep(model, **given(rows()), positions=where, memory_budget=budget, **QUIET)
        assert result.settings["forecast"]["bytes"] <= budget
        np.testing.assert_allclose(result.logits, whole.logits, rtol=1e-5, atol=1e-5)
    assert result.settings["plan"] != whole.settings["plan"]
    with pytest.raises(MemoryBudgetError, match=r"expected at least \d+ bytes"):
        pa.ablation_sweep(model, **given(rows()), positions=where, memory_budget=1000, **QUIET)


def test_out_of_memory_halves_and_goes_on(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pa.ablation_sweep(model, **given(rows()), **QUIET)
    real = Carrier.run

    def tight(self: Any, clean: Any, chunk: Any, *rest: Any) -> torch.Tensor:
        if clean.batch * len(chunk) > 9:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")
        return real(self, clean, chunk, *rest)

    monkeypatch.setattr(Carrier, "run", tight)
    seen: list[tuple[int, int]] = []
    halved = pa.ablation_sweep(model, **given(rows()), verify=0, progress=lambda *call: seen.append(call))
    assert halved.settings["plan"]["sets"] == 3 and seen[-1] == (72, 72)
    np.testing.assert_allclose(halved.logits, whole.logits, rtol=1e-5, atol=1e-5)

    failed = []

    def once(self: Any, clean: Any, chunk: Any, *rest: Any) -> torch.Tensor:
        if not failed and chunk.first[0] == 1:  # the second chunk, when the first is done
            failed.append(True)
            raise torch.OutOfMemoryError("full")
        return real(self, clean, chunk, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Carrier, "run", once)
        patch.setattr(SweepPlanner, "plan", lambda self, budget: SweepPlan(6, 4, 1000))
        seen.clear()
        again = pa.ablation_sweep(model, **given(rows()), verify=0, progress=lambda *call: seen.append(call))
    assert failed and max(seen) == (72, 72)
    np.testing.assert_allclose(again.logits, whole.logits, rtol=1e-5, atol=1e-5)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Carrier, "run", full)
    with unchanged(model), pytest.raises(MemoryBudgetError, match="out of memory on cpu"):
        pa.ablation_sweep(model, **given(rows()), **QUIET)

    def broken(*_: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Carrier, "run", broken)
    with unchanged(model), pytest.raises(RuntimeError, match="cannot be multiplied"):
        pa.ablation_sweep(model, **given(rows()), positions="end", **QUIET)


def test_layers_before_a_set_are_not_recomputed(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens through attention of each layer: the clean run, the identity, and only sets that began earlier."""
    ids = rows((6, 6, 6))
    pa.ablation_sweep(model, **given(ids, "none"), **QUIET)
    counts = [0, 0, 0]
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _m, _a, kwargs, at=at: counts.__setitem__(at, counts[at] + kwargs["hidden_states"][..., 0].numel()),
            with_kwargs=True,
        )
        for at, layer in enumerate(model.model.layers)
    ]
    try:
        sweep_run.oracle._checked[model] = sweep_run.oracle._state(sweep.resolve(model))
        for where, tokens in (("all", 18), ("end", 3)):
            counts[:] = [0, 0, 0]
            pa.ablation_sweep(model, **given(ids, "none"), positions=where, **QUIET)
            clean = 18 + (3 if where == "end" else 0)  # END once more for the arguments of the blocks there
            assert counts == [clean + tokens * (1 + 4 * layer) for layer in range(3)]
            # three chunks, each with an identity of its own from its first layer on
            counts[:] = [0, 0, 0]
            with monkeypatch.context() as patch:
                patch.setattr(SweepPlanner, "plan", lambda self, budget: SweepPlan(3, 4, 1000))
                pa.ablation_sweep(model, **given(ids, "none"), positions=where, **QUIET)
            assert counts == [clean + tokens, clean + tokens * (5 + 1), clean + tokens * (5 + 5 + 1)]
    finally:
        for handle in handles:
            handle.remove()


def test_end_attends_to_one_copy_of_the_keys(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, set[int]] = {}

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        assert k.shape[:2] == (6, 9) and k.shape == v.shape and q.shape[1] == 6
        seen.setdefault(len(seen) if k.data_ptr() not in {p for s in seen.values() for p in s} else -1, set())
        seen[max(seen)].add(k.data_ptr())
        return real(q, k, v, *rest, **options)

    real = ops.shared_prefix_attention
    monkeypatch.setattr(sweep_end.ops, "shared_prefix_attention", watched)
    monkeypatch.setattr(SweepPlanner, "plan", lambda self, budget: SweepPlan(6, 5, 12))
    pa.ablation_sweep(model, **given(rows()), positions="end", **QUIET)
    pointers = {pointer for group in seen.values() for pointer in group}
    assert len(pointers) == 3  # one per layer


# self-checks


@pytest.mark.parametrize("where", POSITIONS)
def test_wrong_arguments_of_a_block_are_noticed(
    model: torch.nn.Module, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary tables of other positions: the identity row is then not the model's own."""
    real = getattr(sweep_run, f"prepare_{where}")

    def wrong(*args: Any) -> Any:
        clean = real(*args)
        for layer in clean.arguments:
            cos, sin = layer.kwargs["position_embeddings"]
            layer.kwargs["position_embeddings"] = (cos.roll(1, -1), sin.roll(1, -1))
        return clean

    monkeypatch.setattr(sweep_run, f"prepare_{where}", wrong)
    with unchanged(model), pytest.raises(SelfCheckError, match="with nothing ablated"):
        pa.ablation_sweep(model, **given(rows()), positions=where, **QUIET)


@pytest.mark.parametrize("where", POSITIONS)
def test_verification_notices_one_wrong_set(
    model: torch.nn.Module, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pa.ablation_sweep(model, **given(rows()), positions=where, **QUIET).verification_error is None
    real = Carrier.run

    def wrong(self: Any, clean: Any, chunk: Any, *rest: Any) -> torch.Tensor:
        found = real(self, clean, chunk, *rest)
        found[1 + 2] *= torch.linspace(0, 3, found.shape[-1])  # set 0.2
        return found

    monkeypatch.setattr(Carrier, "run", wrong)
    with unchanged(model), pytest.raises(SelfCheckError, match=r"set 0\.2"):
        pa.ablation_sweep(model, **given(rows()), positions=where, verify=12, progress=False)


def test_heads_that_are_not_replaced_are_noticed(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of two layers of which only the first is ablated."""

    def forget(now: Any, x: torch.Tensor, sites: Any) -> torch.Tensor:
        return (
            real(dataclasses.replace(now, ablated=None), x, sites) if now.ablated is not None else real(now, x, sites)
        )

    real = sweep_layers._change_z
    monkeypatch.setattr(sweep_layers, "_change_z", forget)
    with pytest.raises(SelfCheckError, match=r"set 0\.1\+1\.1"):
        pa.ablation_sweep(model, **given(rows()), sets=[[(0, 1), (1, 1)]], progress=False)


def test_wrong_family_spec_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"norm": "rms1p"}, {"parallel": True}, {"mlp_norm": "input_layernorm"}):
        other = make("llama", torch.float32)
        with monkeypatch.context() as patch:
            patch.setitem(FAMILIES, "llama", dataclasses.replace(FAMILIES["llama"], **wrong))
            with pytest.raises(SelfCheckError, match="family 'llama'"):
                pa.ablation_sweep(other, **given(rows()), **QUIET)


def test_non_finite_values_are_named() -> None:
    other = make("llama", torch.float32)
    other.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="non-finite"):
        pa.ablation_sweep(other, **given(rows()), **QUIET)


@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("name", NAMES)
def test_leaves_no_trace(name: str, where: str) -> None:
    other = make(name, torch.float32)
    for i, module in enumerate(other.modules()):
        module.training = i % 3 != 0
    with unchanged(other):
        pa.ablation_sweep(other, **given(rows()), positions=where, sets=SETS, predictions=True, progress=False)


# input and output


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([], "at least one set"),
        ([[]], "empty one.*set 0"),
        ([(0, 1), []], "set 1"),
        ([(0, 4), [(3, 0), (1, 1)], ("mlp", 7)], "3 layers of 4 heads.*got 0.4, 3.0, mlp7"),
        ([(-1, 0)], "got -1.0"),
        ([[(0, 1), 3]], "expected .layer, head."),
        ([[(0, "1")]], "expected .layer, head."),
        ([[("attn", 1)]], "expected .layer, head."),
        ("0.1", "list of sets"),
        (3, "list of sets"),
        ([7], "lists of"),
        ([[(0, True)]], "expected .layer, head."),
    ],
)
def test_bad_sets(model: torch.nn.Module, sets: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pa.ablation_sweep(model, **given(rows()), sets=sets, **QUIET)


def test_bad_input(model: torch.nn.Module) -> None:
    inputs = given(rows())
    other = make("llama-gqa2", torch.float32, seed=3)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    holed = mask.clone()
    holed[:, 5:] = torch.tensor([1, 0, 1, 0, 1])
    for change, error, message in (
        ({"positions": "last"}, InputError, "positions: expected one of"),
        ({"verify": -1}, InputError, "verify"),
        ({"progress": "bar"}, InputTypeError, "progress"),
        ({"backend": "tpu"}, InputError, "backend"),
        ({"answers": torch.tensor([1])}, InputError, "answers: expected batch 6"),
        ({"answers": torch.tensor([99] * 6)}, InputError, "answers: expected token ids in"),
        ({"foils": torch.tensor([[1]])}, InputError, "foils: expected batch 6"),
        ({"answers": None}, InputTypeError, "answers"),
        ({"attention_mask": holed}, InputError, "hole"),
        ({"attention_mask": mask * 0}, InputError, "at least one real token"),
        ({"memory_budget": "two"}, InputError, "memory_budget"),
        ({"baseline": "zero"}, InputTypeError, "baseline: expected ZeroAblation"),
        ({"baseline": pa.MeanAblation.from_inputs(other, tokens, mask)}, InputError, "another model"),
        ({"baseline": pa.MeanAblation.from_inputs(model, tokens[:, -5:], over="batch")}, InputError, "longer"),
        ({"baseline": pa.ResampleAblation.from_inputs(model, tokens[[0, 2]], mask[[0, 2]])}, InputError, "2 prompts"),
    ):
        with pytest.raises(error, match=message):
            pa.ablation_sweep(model, **{**QUIET, **inputs, **change})


def test_sets_in_any_form(model: torch.nn.Module) -> None:
    forms = [(1, 2), pa.Head(1, 2), [(1, 2)], [(1, 2), pa.Head(1, 2)], pa.Ablation((pa.Head(1, 2),)), {(1, 2)}]
    result = pa.ablation_sweep(model, **given(rows()), sets=forms, **QUIET)
    assert set(result.sets) == {pa.Ablation((pa.Head(1, 2),))}
    assert np.ptp(result.logits, axis=0).max() < 1e-5
    both = pa.Ablation((pa.Head(0, 1),), (2,))
    assert str(both) == "0.1+mlp2" and both == pa.Ablation.parse([("mlp", 2), (0, 1)])
    assert pa.ablation_sweep(model, **given(rows()), sets=[both], **QUIET).of([(0, 1), ("mlp", 2)]) == 0


def test_prompt_pairs(model: torch.nn.Module) -> None:
    """The clean prompts of a PromptPairs, with its padding and answers."""
    ids = rows((7, 5))
    tokens, mask = (x.numpy() for x in pad([list(row) for row in ids], "right"))
    pairs = PromptPairs(("a", "b"), ("c", "d"), ("e", "f"), tokens, tokens + 0, mask.astype(bool), answers(2).numpy())
    found = pa.ablation_sweep(model, pairs, **QUIET)
    np.testing.assert_allclose(found.logits, pa.ablation_sweep(model, **given(ids), **QUIET).logits, atol=1e-5)
    with pytest.raises(InputError, match=r"answers.*inside the PromptPairs"):
        pa.ablation_sweep(model, pairs, answers(2), **QUIET)


def test_save_and_load(model: torch.nn.Module, tmp_path: Any) -> None:
    result = pa.ablation_sweep(
        model, **given(rows()), sets=SETS, predictions=True, foils=torch.ones(6, 2).long(), progress=False
    )
    result.save(tmp_path / "sweep")
    loaded = pa.AblationSweep.load(tmp_path / "sweep")
    for field in dataclasses.fields(result):
        before, after = getattr(result, field.name), getattr(loaded, field.name)
        if isinstance(before, np.ndarray):
            np.testing.assert_array_equal(before, after)
            assert before.dtype == after.dtype
        else:
            assert before == after, field.name
    assert repr(loaded) == repr(result) and "mlp1" in repr(result)
    with pytest.raises(InputError, match="expected a saved AblationSweep"):
        pa.AblationSweep.load(tmp_path)


def test_effects_and_progress(model: torch.nn.Module) -> None:
    seen: list[tuple[int, int]] = []
    result = pa.ablation_sweep(model, **given(rows()), verify=0, progress=lambda *call: seen.append(call))
    assert seen[-1] == (72, 72)
    usable = result.clean_logits > 0
    expected = ((result.logits - result.identity_logits)[:, usable] / result.clean_logits[usable]).mean(1)
    np.testing.assert_allclose(result.effects, expected, rtol=1e-5)
    assert result.n_ratio_excluded == 6 - usable.sum()
    assert [row["set"] for row in result.rows()][:2] == ["0.0", "0.1"]
    settings = result.settings
    assert settings["plan"]["sets"] == 12 and settings["forecast"]["seconds"] > 0
    assert settings["seconds"].keys() == {"clean", "ablated"} and "total effect" in result.semantics


def test_floor_of_the_benchmark_has_the_flop_of_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of one forward per head and the clean one, at all positions; END alone, and the clean one, at END."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    from case_sweep import SweepFloor
    from workloads import FULL, build_model, quick

    work = quick(FULL["llama12x12"])
    floor = SweepFloor(work, build_model(work))
    mlp, attention = work.mlp_flop, 8 * work.d_model**2
    layers, heads, batch, tokens = work.n_layers, work.n_heads, work.batch, work.batch * work.pos
    clean = layers * tokens * (attention + mlp) - (tokens - batch) * mlp
    blocks = heads * layers * (layers - 1) // 2 * (attention + mlp)
    early = heads * (layers - 1) * mlp  # a head's own MLP; one of the blocks above is the last, whose MLP is END's
    expected = {
        "all": clean + blocks * tokens - early * (tokens - batch) + early * tokens + heads * mlp * batch,
        "end": clean + (blocks + early + heads * mlp) * batch,
    }
    for where in POSITIONS:
        with FlopCounterMode(display=False) as counter:
            floor.sweep(where)
        assert counter.get_total_flops() == floor.flop(where) == expected[where]


def test_forecast_counts_what_the_model_does(model: torch.nn.Module) -> None:
    """FLOP of the blocks against a count by hand: 3 layers of 4 heads, 6 prompts."""
    forecast = pa.ablation_sweep(model, **given(rows()), **QUIET).settings["forecast"]
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    mlp = sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    tokens, n = sum(LENGTHS), len(LENGTHS)
    later = 4 * (2 + 1) * block * tokens - 8 * mlp * (tokens - n)
    expected = later + 8 * mlp * tokens + 4 * mlp * n + 3 * block * tokens - mlp * (tokens - n)
    assert forecast["replay_flop"] == 2 * expected and forecast["capture_flop"] == 2 * 3 * block * tokens
