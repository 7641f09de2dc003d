"""What a GPU asks of the engine, shown without one: on tensors that have shapes but no data.

The replay of a 7B model runs here with every op of torch and of pyarith recorded: nothing in it may wait for the
device or ask it for a value, and its memory must be what the planner said.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyarith.engine import planner as planning
from pyarith.engine.batch import Batch
from pyarith.engine.capture import allocate
from pyarith.engine.planner import Plan, Planner
from pyarith.engine.replay import Replay
from pyarith.models.sites import resolve

SHAPES = {
    "llama2-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "llama3-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
# ops that copy a value to the host or whose result's shape depends on values: each waits for the device
WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2")


@dataclass
class Recorded(TorchDispatchMode):
    """Names of all ops, and the high-water mark of bytes that were allocated meanwhile and are still alive."""

    names: list[str] = field(default_factory=list)
    alive: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func).split(".")[1])
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def hollow(name: str):
    """A random-weight model of that shape whose parameters have no data (inside a FakeTensorMode)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[name])).eval()
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=torch.bfloat16)
                module._parameters[key] = torch.nn.Parameter(empty, requires_grad=False)
        for key, value in module._buffers.items():
            module._buffers[key] = torch.empty(value.shape, dtype=value.dtype)
    return model


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
