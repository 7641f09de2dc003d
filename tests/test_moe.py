"""Mixtures of experts: what every family goes through, in one case each, and what only they can do."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantised_models
import sweep_oracle
import test_families
import torch
from family_cases import CASES, check_sweep
from single_thread import one_thread  # noqa: F401
from tiny_models import MOE, inputs, make, prompts

import pyarith as pa
from pyarith.cli.arithmetic import _summary
from pyarith.engine import oracle, routing
from pyarith.engine.profiling import Account
from pyarith.engine.replay import Mlp
from pyarith.errors import SelfCheckError, UnsupportedModelError
from pyarith.models.sites import resolve
from pyarith.models.weights import read_mlp


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MOE)
def test_as_every_family(name: str, case: str) -> None:
    test, settings = CASES[case]
    test(name, *settings)


@pytest.mark.parametrize("where", sweep_oracle.POSITIONS)
@pytest.mark.parametrize("name", MOE)
def test_sweep(name: str, where: str) -> None:
    check_sweep(name, where)


def test_frozen_mlps() -> None:
    test_families.test_exact("gpt-oss", "frozen", "none")


def near_tie(dtype: torch.dtype, difference: float, **config: Any) -> Any:
    """A model whose routers score experts 0 and 1 nearly equal, so that rounding chooses between them."""
    model = make("mixtral", dtype, **config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            scores = layer.mlp.gate.weight
            scores[1] = scores[0] + difference * torch.randn(scores[0].shape, generator=generator).to(dtype)
    return model


def patched(model: Any, seed: int, n: int = 1, **options: Any) -> Any:
    given = inputs(prompts((7,) * n, seed=seed), [5] * n)
    return pa.fast_patch(model, **given, progress=False, **options)


def test_identity_rows_that_go_to_other_experts_are_counted(tmp_path: Path) -> None:
    model = near_tie(torch.bfloat16, 0.002, num_experts_per_tok=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the self-check
        result = patched(model, 3, n=60, verify=0)
    counted = np.array(result.settings["rerouted"])
    moved = (np.abs(result.identity_logits - result.clean_logits) > 1).sum(1)
    assert moved.sum() > 0 and (counted >= moved).all() and counted.shape == (3,)
    assert result.n_rerouted == counted.sum() and f"{counted.sum()} identity rows went to other" in repr(result)
    result.save(tmp_path)
    assert pa.PatchResult.load(tmp_path).n_rerouted == counted.sum()
    assert pa.PatchResult.merge([result, result]).settings["rerouted"] == (2 * counted).tolist()
    exact = patched(make("mixtral", torch.float32), 3, n=60, verify=0)  # only rows of senders change their experts
    assert exact.settings["rerouted"] == [0, 0, 0]
    frozen = patched(model, 3, verify=0, mlps="frozen")
    assert frozen.n_rerouted == 0 and "other experts" not in repr(frozen)


def test_the_order_of_the_same_experts_is_no_other_choice() -> None:
    model = near_tie(torch.bfloat16, 0.002)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[2:] = -layer.mlp.gate.weight.data[0]  # one of the pairs 0, 1 and 2, 3, never mixed
    assert patched(model, 3, n=60, verify=0).settings["rerouted"] == [0, 0, 0]


def test_other_experts_are_tolerated_in_16_bits_only_and_said() -> None:
    """Where both checks meet rounding that chooses an expert; which prompts those are depends on the machine."""
    said: set[str] = set()
    model = near_tie(torch.bfloat16, 0.002, num_experts_per_tok=1)
    for seed in range(60):
        oracle.forget(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patched(model, seed, verify=6)
        texts = [str(each.message) for each in caught]
        said |= {text.split(":")[0] for text in texts if "other experts" in text or "different experts" in text}
        if said == {"self-check", "verification"}:
            break
    assert said == {"self-check", "verification"}
    model = near_tie(torch.float32, 1e-7, num_experts_per_tok=1)
    with pytest.raises(SelfCheckError, match="other experts"):
        for seed in range(60):
            oracle.forget(model)
            patched(model, seed, verify=0)


@pytest.mark.parametrize("kind", quantised_models.KINDS)
def test_other_experts_are_tolerated_where_quantised_linears_round(kind: str, tmp_path: Path) -> None:
    """The model is in fp32: products of wider weights must choose as it does, activations in int8 need not."""
    model = quantised_models.load(quantised_models.save(tmp_path, "mixtral"), kind)
    assert routing.tolerated(resolve(model)) == (kind in quantised_models.INT8)


def test_discover_tells_of_them_where_there_are_any() -> None:
    model, tokenizer = pa.load_demo()
    found = pa.discover(model, pa.tasks.arithmetic(tokenizer, "+", n=4), progress=False, verify=0)
    counted = replace(found, result=replace(found.result, settings={**found.result.settings, "rerouted": [2, 1]}))
    row = "identity rows at other experts"
    assert _summary({"+": counted, "-": found})[row] == ["3", "0"] and row not in _summary({"+": found})


def test_sweeps_tolerate_other_experts_in_16_bits_only() -> None:
    ids = torch.tensor([list(prompt.clean) for prompt in prompts((7,) * 60, seed=3)])
    for dtype, difference in ((torch.bfloat16, 0.002), (torch.float32, 1e-7)):
        model = near_tie(dtype, difference, num_experts_per_tok=1)
        found = pytest.warns(UserWarning, match="mixture of experts") if dtype == torch.bfloat16 else (
            pytest.raises(SelfCheckError)
        )  # fmt: skip
        with found:
            result = pa.ablation_sweep(model, ids, torch.full((60,), 5), sets=[(0, 1)], progress=False, verify=2)
            assert result.noise_floor > 1


@pytest.mark.parametrize("how", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen2-moe", "gpt-oss"])
def test_memory_of_experts_is_part_of_the_plan(name: str, how: str) -> None:
    """What a call of the module holds at once, against what the planner takes a row for."""
    sizes = {"moe_intermediate_size": 96} if name == "qwen2-moe" else {"intermediate_size": 96}
    model = make(name, torch.float32, hidden_size=128, num_experts=8, **sizes)
    model.config._experts_implementation = how
    sites = resolve(model)
    mlp, n = sites.blocks[1].mlp, 256
    rows = torch.randn(4, n // 4, sites.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Account(sites.device) as account:
        mlp(rows)
    held = account.high_water.bytes / rows.itemsize / n
    assert held <= Mlp(sites, mlp, "auto").held < 2 * held


@pytest.mark.parametrize(("name", "sparse"), [("mixtral", 3), ("qwen2-moe", 2), ("qwen3-moe", 1), ("gpt-oss", 3)])
def test_dense_layers_between_sparse_ones(name: str, sparse: int) -> None:
    """Dense layers are fused, the others counted; experts are no slices that could be trained."""
    model = make(name, torch.float32)
    blocks = resolve(model).blocks
    assert [block.router is not None for block in blocks].count(True) == sparse
    dense = [read_mlp(resolve(model), block.mlp) is not None for block in blocks]
    assert dense.count(True) == 3 - sparse
    with pytest.raises(UnsupportedModelError, match=r"outside plain linear projections.*experts"):
        pa.SelectiveTuner(model, [(0, 1)], mlps=[1])
