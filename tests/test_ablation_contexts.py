"""``ablated`` as a context: nesting, no trace, what it refuses and warns about."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from ablation_letter import (
    HEADS,
    MLPS,
    Model,
    blocks,
    differs,
    given,
    letter,
    logits,
    projection,
    rows,
    run,
)
from single_thread import one_thread  # noqa: F401
from snapshot import unchanged
from tiny_models import VOCAB, make

import pyarith as pa
from pyarith.engine.baselines import Baseline, MeanAblation, ResampleAblation, ZeroAblation
from pyarith.errors import InputError, InputTypeError, NonFiniteError, PyarithError, UnsupportedModelError
from pyarith.models.sites import resolve

# --- contexts -------------------------------------------------------------------------------------------------------


def test_contexts_nest() -> None:
    model, other = make("llama-gqa2"), make("gpt2")
    ids = torch.tensor(rows((7, 7)))
    mean = MeanAblation.from_inputs(model, ids)
    plain = logits(model, ids, None)
    with pa.ablated(model, HEADS):
        outer = logits(model, ids, None)
        with pa.ablated(model, [(0, 1), (1, 3)], mean):
            both = logits(model, ids, None)
            with pa.ablated(other, [(0, 0)]):
                assert torch.equal(logits(model, ids, None), both)
                assert differs(logits(other, ids, None), plain)
        assert torch.equal(logits(model, ids, None), outer)
    assert torch.equal(logits(model, ids, None), plain)
    inner = {(0, 1): mean.heads[0, 0, 1], (1, 3): mean.heads[1, 0, 3]}
    with letter(model, {(0, 2): 0.0, (2, 0): 0.0, **inner}):
        assert torch.equal(logits(model, ids, None), both)


def lived_in(name: str) -> Model:
    no_dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    model = make(name, torch.float32, **no_dropout)
    for i, module in enumerate(model.modules()):
        module.training = i % 3 != 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    model.register_forward_hook(lambda *_: None)
    projection(model, 0).register_forward_pre_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("name", ["llama-gqa2", "gemma2", "gpt2", "neox", "phi3"])
def test_leaves_no_trace(name: str) -> None:
    model = lived_in(name)
    _, ids, mask = given("left")
    with unchanged(model):
        mean = MeanAblation.from_inputs(model, ids, mask)
        resampled = ResampleAblation.from_inputs(model, ids, mask)
        for baseline in (ZeroAblation(), mean, resampled):
            with pa.ablated(model, HEADS, baseline, mlps=MLPS):
                training = [module.training for module in model.modules()]
                logits(model, ids, mask)
                assert [module.training for module in model.modules()] == training
        with pytest.raises(KeyboardInterrupt), pa.ablated(model, HEADS, mean, mlps=MLPS):
            logits(model, ids, mask)
            raise KeyboardInterrupt
        with pytest.raises(InputError), pa.ablated(model, HEADS, resampled):
            logits(model, ids[:2], mask[:2])  # an error out of a hook
        with pytest.raises(InputError), pa.ablated(model, [*HEADS, (9, 9)]):
            pass
    hook = projection(model, 1).register_forward_hook(broken)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        MeanAblation.from_inputs(model, ids, mask)
    hook.remove()


def broken(*_: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("heads", "mlps", "error", "message"),
    [
        ([], [], InputError, "at least one head or MLP"),
        ([(0, 1), (3, 0), (0, 4), (-1, 0)], [7], InputError, r"0 to 2 with heads 0 to 3.*3\.0, 0\.4, -1\.0; mlps.*7"),
        ([(0, 1), (1, 1), (0, 1)], [2, 0, 2], InputError, r"each head once, got twice 0\.1; mlps: .* twice 2"),
        (["0.1"], [], InputTypeError, r"Head\.parse"),
        ("0.1", [], InputTypeError, "expected a list"),
        ((0, 1), [], InputTypeError, r"\(layer, head\) tuples of integers .*got 0, 1"),
        ([(0, 1, 2), (0.5, 1), (True, 1)], [], InputTypeError, r"got \[0, 1, 2\], \[0\.5, 1\], \[True, 1\]"),
        ([], 1, InputTypeError, "mlps: expected a list"),
        ([], ["1"], InputTypeError, "mlps: expected layer numbers"),
        ([], [1.0, (1,)], InputTypeError, "mlps: expected layer numbers"),
    ],
)
def test_bad_targets(heads: Any, mlps: Any, error: type[PyarithError], message: str) -> None:
    model = make("llama", torch.float32)
    with unchanged(model), pytest.raises(error, match=message):
        pa.ablated(model, heads, mlps=mlps)


def test_targets_of_other_kinds() -> None:
    """Heads as ``pa.Head``, lists, numpy or torch integers; any iterable."""
    import numpy as np

    model = make("llama", torch.float32)
    ids = torch.tensor(rows((7,)))
    found = []
    for heads in ([(0, 1), (2, 0)], iter([pa.Head(0, 1), pa.Head(2, 0)]), np.array([[0, 1], [2, 0]]),
                  torch.tensor([[0, 1], [2, 0]]), [[0, 1], [np.int64(2), 0]], {(0, 1), (2, 0)}):  # fmt: skip
        with pa.ablated(model, heads):
            found.append(logits(model, ids, None))
    assert all(torch.equal(found[0], other) for other in found)
    with pa.ablated(model, mlps=np.arange(2)):
        logits(model, ids, None)


def test_bad_baselines() -> None:
    model, other = make("llama", torch.float32), make("llama-gqa2", torch.float32)
    smaller = make("qwen3", torch.float32)
    ids = torch.tensor(rows((7, 7)))
    mean = MeanAblation.from_inputs(model, ids)
    for bad in ("zero", ZeroAblation, mean.heads):
        with pytest.raises(InputTypeError, match="baseline: expected ZeroAblation"):
            pa.ablated(model, HEADS, bad)
    for wrong in (other, make("llama", torch.float32, seed=1), make("llama", torch.bfloat16)):
        with pytest.raises(InputError, match="another model of the same sizes"):
            pa.ablated(wrong, HEADS, mean)
    with pytest.raises(InputError, match=r"n_layers, n_heads, d_head, d_model are \(3, 4, 8, 32\).* \(3, 4, 12, 32\)"):
        pa.ablated(smaller, HEADS, mean)
    sdpa = make("llama", torch.float32, attn="sdpa")
    pa.ablated(sdpa, HEADS, mean)  # another attention kernel is no other model
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").add_(1e-3)
    with pytest.raises(InputError, match="weights, their dtype or the config have changed"):
        pa.ablated(model, HEADS, mean)


def test_check_of_prompts() -> None:
    """What a sweep asks before it runs."""
    model = make("llama", torch.float32)
    sites = resolve(model)
    _, ids, mask = given("left")
    per_position = MeanAblation.from_inputs(model, ids[:1, -7:], over="batch")
    resampled = ResampleAblation.from_inputs(model, ids, mask)
    ZeroAblation().check(sites, 5, 100)
    MeanAblation.from_inputs(model, ids, mask).check(sites, 5, 100)
    per_position.check(sites, 5, 7)
    resampled.check(sites, 6, torch.tensor([7, 5, 9, 5, 7, 9]))
    with pytest.raises(InputError, match="positions 0 to 6 of its reference"):
        per_position.check(sites, 5, 8)
    with pytest.raises(InputError, match="prompts 1, 3 are longer"):
        resampled.check(sites, 6, torch.tensor([7, 6, 9, 6, 7, 9]))
    with pytest.raises(InputError, match="6 prompts, one row each; got a batch of 3"):
        resampled.check(sites, 3)
    assert [b.name for b in (ZeroAblation(), per_position, resampled)] == [
        "zero", "mean(over='batch')", "resample(seed=0)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "mask", "over", "message"),
    [
        ([[1, 2], [3, 4]], [[1, 1], [0, 0]], "batch_pos", "at least one real token per prompt; prompts 1"),
        ([[1, 2, 3]], [[1, 0, 1]], "batch_pos", "hole"),
        ([[1, 2, 3]], [[1, 1]], "batch_pos", r"expected shape \[1, 3\]"),
        ([[1, VOCAB]], None, "batch_pos", "token ids in"),
        ([[1.0, 2.0]], None, "batch_pos", "integer token ids|a pair"),
        (torch.zeros(0, 4, dtype=torch.long), None, "batch_pos", "at least one prompt"),
        ([], None, "batch_pos", "at least one batch of prompts, got none"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 1]], "batch", r"equal length \(aligned.*\[1, 2\]"),
        ([torch.tensor([[1, 2]]), torch.tensor([[1, 2, 3]])], None, "batch", "expected 2 tokens each, got .3."),
        ([torch.tensor([[1, 2]]), 3], None, "batch_pos", "batch 1 to be a tensor or a pair"),
        ([[1, 2]], None, "tokens", r"over: expected one of \('batch_pos', 'batch'\)"),
    ],
)
def test_bad_reference_sets(ids: Any, mask: Any, over: str, message: str) -> None:
    model = make("llama", torch.float32)
    with unchanged(model), pytest.raises(InputError, match=message):
        MeanAblation.from_inputs(model, ids, mask, over=over)


def test_bad_values_in_the_reference() -> None:
    model = make("llama", torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.v_proj.weight")[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 1: the mean of the z"):
        MeanAblation.from_inputs(model, [[1, 2, 3]])


def test_save_and_load(tmp_path: Any) -> None:
    model = make("llama-gqa2", torch.bfloat16)
    _, ids, mask = given("left")
    made: list[Baseline] = [
        ZeroAblation(), MeanAblation.from_inputs(model, ids, mask), ResampleAblation.from_inputs(model, ids, mask),
    ]  # fmt: skip
    for baseline in made:
        baseline.save(tmp_path / baseline.name)
        loaded = type(baseline).load(tmp_path / baseline.name)
        assert type(Baseline.load(tmp_path / baseline.name)) is type(baseline)
        assert loaded.name == baseline.name and loaded is not baseline
        results = []
        for each in (baseline, loaded):
            with pa.ablated(model, HEADS, each, mlps=MLPS):
                results.append(logits(model, ids, mask))
        assert torch.equal(*results)
    with pytest.raises(InputError, match=r"kind .'MeanAblation'.*got 'ZeroAblation'"):
        MeanAblation.load(tmp_path / "zero")
    with pytest.raises(InputError, match=r"baseline\.json"):
        Baseline.load(tmp_path)
    (tmp_path / "zero" / "baseline.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match="expected format 1, got 99"):
        Baseline.load(tmp_path / "zero")


# --- what would silently do nothing ---------------------------------------------------------------------------------


def test_a_model_that_did_not_run_is_warned_about() -> None:
    model = make("llama", torch.float32)
    with pytest.warns(UserWarning, match="did not run inside the block"), pa.ablated(model, HEADS):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pa.ablated(model, HEADS):
            run(model, [1, 2, 3])
        with pytest.raises(ZeroDivisionError), pa.ablated(model, HEADS):
            raise ZeroDivisionError  # an error says enough


def test_compiled_models_are_refused() -> None:
    model = make("llama", torch.float32)
    model.compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match="the model itself was compiled"):
        pa.ablated(model, HEADS)
    model = make("llama", torch.float32)
    blocks(model)[1].compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1 was compiled"):
        pa.ablated(model, HEADS)


def test_gradient_checkpointing_is_refused() -> None:
    model = make("llama", torch.float32)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    ids = torch.tensor(rows((7,)))
    with pa.ablated(model, HEADS):
        found = logits(model.eval(), ids, None)
        assert torch.equal(logits(model.train(), ids, None), found)
        with pytest.raises(UnsupportedModelError, match="layer 0 uses gradient checkpointing"):
            model(ids)


def test_single_blocks_are_refused_where_positions_count() -> None:
    model = make("gpt2", torch.float32)
    ids = torch.tensor(rows((7, 7)))
    baseline = MeanAblation.from_inputs(model, ids, over="batch")
    with pytest.raises(InputError, match="as a whole, not single blocks"), pa.ablated(model, HEADS, baseline):
        blocks(model)[0](torch.zeros(1, 7, 32))
