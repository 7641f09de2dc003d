"""What a GPU asks of the engine, shown without one: on tensors that have shapes but no data.

The replay of a 7B model runs here with every op of torch and of pyarith recorded: nothing in it may wait for the
device or ask it for a value, and its memory must be what the planner said.
"""

from __future__ import annotations

import pytest
import torch
from hollow import SHAPES, Recorded, hollow
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pyarith.engine import planner as planning
from pyarith.engine.batch import Batch
from pyarith.engine.capture import allocate
from pyarith.engine.planner import Plan, Planner
from pyarith.engine.replay import Replay
from pyarith.models.sites import resolve

# ops that copy a value to the host or whose result's shape depends on values: each waits for the device
WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2")


def batch_of(prompts: int, length: int = 16) -> Batch:
    ids = torch.zeros(prompts, length, dtype=torch.int64)
    lengths = torch.full((prompts,), length)
    return Batch(ids, ids, lengths, torch.full((prompts,), length // 2), ids[:, :1])


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The planner's limits for GPUs, under the device type that the hollow tensors have."""
    for table in ("_MAX_TOKENS", "_MAX_ROWS", "_MAX_PREFIXED_TOKENS", "_ENOUGH_BYTES"):
        values = getattr(planning, table)
        monkeypatch.setitem(values, "cpu", values["cuda"])
    monkeypatch.setattr(planning, "free_bytes", lambda device: 100 * 2**30)


def replayed(name: str, prompts: int, log_probs: bool = False) -> tuple[Recorded, Planner, Plan, Replay]:
    """Run the replay of one block as the planner cuts it."""
    batch = batch_of(prompts)
    hollow_tensors = FakeTensorMode(allow_non_fake_inputs=True)
    with hollow_tensors:
        sites = resolve(hollow(name))
        replay = Replay(sites, "auto", heads=True, mlps=True, frozen=False, log_probs=log_probs)
    planner = Planner(sites, replay, batch, 0, True)
    plan = planner.plan(None)
    with hollow_tensors, torch.no_grad():
        targets = torch.zeros(plan.prompts, 1, dtype=torch.int64)
        with Recorded() as recorded:
            captured = allocate(sites, plan.prompts, True)
            replay.run(captured, targets, plan.rows)
    return recorded, planner, plan, replay


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("log_probs", (False, True))
def test_the_replay_of_a_7b_model_never_waits_and_fits_its_plan(name, log_probs, as_on_a_gpu):
    recorded, planner, plan, _ = replayed(name, 100, log_probs)
    assert [n for n in recorded.names if n in WAITS] == []
    assert "add_norm" in recorded.names and "gated_act" in recorded.names
    assert planner.bytes(plan) <= 4 * 2**30
    assert recorded.peak <= planner.bytes(plan), (recorded.peak / 2**30, planner.bytes(plan) / 2**30)
    assert recorded.peak >= 0.5 * planner.bytes(plan)  # the plan is no gross overestimate either


def test_memory_does_not_grow_with_the_number_of_prompts(as_on_a_gpu):
    peaks = [replayed("llama2-7b", n)[0].peak for n in (200, 1000)]
    assert max(peaks) <= 4 * 2**30


def test_one_sweep_over_the_weights_per_block(as_on_a_gpu):
    recorded, _, plan, replay = replayed("llama2-7b", 100)
    products = sum(n in ("mm", "addmm") for n in recorded.names)
    sites = replay.sites
    blocks = [-(-entry.stop // max(1, plan.rows // plan.prompts)) for entry in replay.entries[: sites.n_layers]]
    assert products == 3 * sum(blocks)  # gate, up, down of each row block of each layer, layer by layer


def test_a_wait_and_a_leak_would_be_seen():
    with FakeTensorMode(), Recorded() as recorded:
        kept = [torch.empty(1000) for _ in range(3)]
        torch.empty(500)
        with pytest.raises(DataDependentOutputException):
            bool(kept[0].sum() > 0)
    assert "_local_scalar_dense" in recorded.names and "_local_scalar_dense" in WAITS
    assert recorded.peak >= 4 * 3500 and 4 * 3000 <= recorded.alive < 4 * 3500
