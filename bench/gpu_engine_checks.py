"""Stage "engine": fast_patch on this device against literal hooks in fp64, and what a GPU asks of the replay."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import literal_oracle
import numpy as np
import tiny_models
import torch
from gpu_work import Bench, Case
from harness import Check, Row, relative_error
from true_fp64 import true_fp64

import pyarith
from pyarith import ops
from pyarith.discovery.patching import _OPS
from pyarith.engine import guard, run
from pyarith.engine.batch import make_batch
from pyarith.engine.capture import Prefix, allocate, capture
from pyarith.engine.replay import Replay
from pyarith.models.sites import resolve

FAMILIES = ("llama", "llama-gqa2", "qwen2", "gemma2", "phi3", "gpt2", "neox")
FP32_BOUND = 2e-5  # largest difference of logit changes over the largest change
LENGTHS = (7, 5, 9, 8)


class Truth:
    """A tiny random model, prompts, and every patched logit in fp64 and by hooks in the model's own dtype."""

    def __init__(self, name: str, dtype: torch.dtype, seed: int) -> None:
        self.model = tiny_models.make(name, dtype, seed=seed)
        self.pairs = tiny_models.prompts(LENGTHS, seed=seed)
        with true_fp64():
            exact = literal_oracle.path_patch(copy.deepcopy(self.model).double(), self.pairs)
        self.answers = exact.answers
        self.exact = self._changes(exact)
        if dtype is torch.bfloat16:
            self.literal = self._changes(literal_oracle.path_patch(self.model, self.pairs))
        self.inputs = tiny_models.inputs(self.pairs, self.answers, "left")

    def _changes(self, found: literal_oracle.Oracle) -> np.ndarray:
        """Change of the answer's logit by every head, then by every MLP, [sender, batch]."""
        heads, mlps, clean, _ = found.at(self.answers)
        return np.concatenate([(heads - clean).reshape(-1, len(clean)), mlps - clean])


def changes(result: Any) -> np.ndarray:
    """The same of a PatchResult: patched minus the identity row of the same layer."""
    heads = result.head_logits - result.identity_logits[:, None]
    mlps = result.mlp_logits - result.mlp_identity_logits
    return np.concatenate([heads.reshape(-1, heads.shape[-1]), mlps])


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def patch(model: torch.nn.Module, inputs: Mapping[str, Any], **options: Any) -> Any:
    return pyarith.fast_patch(model, **inputs, progress=False, **{"verify": 0, **options})


def cases(bench: Bench) -> list[Case]:
    native = "cpu" if bench.tiny else "cuda"
    planned = []
    for name in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            for backend in ("auto", native, "reference"):
                case = f"fast_patch {name} {backend} {str(dtype).removeprefix('torch.')}"
                if all(ops.why_not(op, backend, bench.device, dtype) is None for op in _OPS if backend == native):
                    planned.append(Case("engine", case, partial(family, name=name, dtype=dtype, backend=backend)))
    for dtype in (torch.float32, torch.bfloat16):
        planned.append(
            Case("engine", f"replay without waiting {dtype}".replace("torch.", ""), partial(replay, dtype=dtype))
        )
    planned.append(Case("engine", "out of memory", out_of_memory))
    if not bench.tiny and torch.cuda.device_count() > 1:
        planned.append(Case("engine", "two devices", two_devices))
    return planned


def family(bench: Bench, name: str, dtype: torch.dtype, backend: str) -> None:
    """fp32: logit changes are those of fp64. bf16: no further from fp64 than twice what literal hooks in bf16 are."""
    key = f"truth {name} {dtype}"
    truth: Truth = bench.cache.setdefault(key, None) or Truth(name, dtype, bench.seed % 1000)
    bench.cache[key] = truth
    found = changes(patch(copy.deepcopy(truth.model).to(bench.device), truth.inputs, backend=backend, verify=2))
    scale = np.abs(truth.exact).max()
    if dtype is torch.float32:
        check = Check("literal hooks in fp64", float(np.abs(found - truth.exact).max() / scale), FP32_BOUND)
    else:
        bound = 2 * rms(truth.literal - truth.exact) / scale + 1e-3
        check = Check("literal hooks in fp64, rms", rms(found - truth.exact) / scale, bound)
        if rms(truth.exact) / scale < 2 * bound:
            raise ValueError(f"{name}: effects of {rms(truth.exact):.3g} drown in rounding; this check says nothing")
    check.require(f"fast_patch on {name}, backend {backend}")
    shape = {"senders": len(found), "batch": len(LENGTHS)}
    bench.write(
        Row(name="check fast_patch", provider=backend, shape={"model": name, **shape}, dtype=_name(dtype), check=check)
    )


class Prepared:
    """A block of prompts whose captures are done: its replay can be run again and again."""

    def __init__(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> None:
        sites = resolve(model)
        batch = make_batch(sites, **inputs)
        self.replay = Replay(sites, "auto", heads=True, mlps=True, frozen=False, log_probs=False)
        self.captured = allocate(sites, len(batch), True)
        with guard.untouched(model):
            prefix = Prefix(sites, batch.clean[0, :0])
            capture(sites, batch, torch.arange(len(batch)), prefix, self.captured, slice(0, len(batch)))
        self.targets = batch.targets.to(sites.device)

    @torch.no_grad()
    def run(self, row_block: int) -> torch.Tensor:
        return self.replay.run(self.captured, self.targets, row_block).logits


def replay(bench: Bench, dtype: torch.dtype) -> None:
    """A replay never makes the host wait, and captured in a graph it gives the same bits."""
    truth = Truth("llama", dtype, bench.seed % 1000)
    prepared = Prepared(truth.model.to(bench.device), truth.inputs)
    expected = prepared.run(64)
    with bench.clock.no_waiting():
        again = prepared.run(64)
    results: list[torch.Tensor] = []
    graph = bench.clock.captured(lambda: results.append(prepared.run(64)))
    prepared.run(8)  # writes other numbers into the buffers that the graph reads and fills
    graph()
    bench.clock.synchronise()
    for how, value in (("a second run", again), ("a replayed graph", results[-1])):
        if not torch.equal(value, expected):
            raise ValueError(f"replay, {how}: differs from the first by {relative_error(value, expected):.3g}")


def out_of_memory(bench: Bench) -> None:
    """Too little memory for the planned blocks: they are halved, and the results stay what they are."""
    sizes = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128)
    if not bench.tiny:
        sizes = dict(num_hidden_layers=4, hidden_size=1024, intermediate_size=2816, num_attention_heads=16)
    model = tiny_models.make("llama", torch.float32, num_key_value_heads=sizes.get("num_attention_heads", 4), **{
        **sizes, "max_position_embeddings": 64
    }).to(bench.device)  # fmt: skip
    inputs = tiny_models.inputs(tiny_models.prompts((12,) * 128, seed=bench.seed % 1000), [5] * 128)
    plenty = patch(model, inputs, memory_budget="64GiB")
    bench.clock.synchronise()
    with little_memory(bench):
        halved = patch(model, inputs, memory_budget="64GiB")
    if halved.settings["plan"]["prompts"] >= plenty.settings["plan"]["prompts"]:
        raise ValueError(f"blocks were not halved: {plenty.settings['plan']}, then {halved.settings['plan']}")
    error = float(np.abs(changes(halved) - changes(plenty)).max() / np.abs(changes(plenty)).max())
    Check("unlimited memory", error, FP32_BOUND).require("fast_patch in little memory")


@contextmanager
def little_memory(bench: Bench) -> Iterator[None]:
    """Room for less than the blocks that were planned without a limit: on the CPU by a refusal of large captures."""
    if bench.tiny:
        real = run.capture

        def tight(sites: Any, batch: Any, indices: torch.Tensor, *rest: Any) -> None:
            if len(indices) > 40:
                raise torch.OutOfMemoryError("rehearsed")
            real(sites, batch, indices, *rest)

        run.capture = tight
        try:
            yield
        finally:
            run.capture = real
        return
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(bench.device)[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(bench.device) + 96 * 2**20) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def two_devices(bench: Bench) -> None:
    """A model on the second device, while the first is the current one."""
    truth = Truth("llama", torch.float32, bench.seed % 1000)
    found = [changes(patch(copy.deepcopy(truth.model).to(f"cuda:{i}"), truth.inputs)) for i in (0, 1)]
    error = float(np.abs(found[1] - found[0]).max() / np.abs(found[0]).max())
    Check("the first device", error, FP32_BOUND).require("fast_patch on the second device")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
