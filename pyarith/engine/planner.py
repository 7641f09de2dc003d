"""From a memory budget to block sizes, with a forecast of FLOP, bytes and seconds.

The results of a run depend on the blocks only through rounding, which the noise floor reports.
"""

from __future__ import annotations

import functools
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyarith.engine import capture
from pyarith.engine.batch import Batch
from pyarith.engine.packing import pair_tokens
from pyarith.engine.replay import Replay
from pyarith.errors import InputError, MemoryBudgetError, check
from pyarith.models.quantised import n_parameters, scratch_bytes
from pyarith.models.sites import ModelSites

# Larger blocks stop paying off here: GEMMs are on their plateau and intermediates leave the cache (bench/NOTES.md).
_MAX_PROMPTS = 128
_MAX_TOKENS = {"cpu": 2048, "cuda": 16384}
# Behind a stored prefix the pairs of a forward pass share one row and pay for masked attention among each other.
_MAX_PREFIXED_TOKENS = {"cpu": 512, "cuda": 2048}
_MAX_ROWS = {"cpu": 512, "cuda": 16384}
# Several ranks take about so many blocks each, unless blocks became smaller than this: a sweep reads all weights.
_TURNS, _MIN_SHARED = 4, 8
# What a run without a stated budget takes at most: on a GPU, blocks of this size keep the GEMMs on their plateau.
_ENOUGH_BYTES = {"cuda": 4 * 2**30}
# A stored prefix costs a forward pass of its own and one copy of its keys per group; shorter ones do not pay.
_MIN_PREFIX = 16
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Plan:
    """Block sizes: prompts per sweep over the weights, capture tokens per forward pass, rows per MLP call."""

    prompts: int
    tokens: int
    rows: int

    def halved(self) -> Plan | None:
        """Half of everything, or None when nothing is left to halve."""
        smaller = Plan(max(1, self.prompts // 2), max(1, self.tokens // 2), max(1, self.rows // 2))
        return None if smaller == self else smaller


@dataclass(frozen=True)
class Forecast:
    """What a run will cost; ``seconds`` at the GEMM rate measured on this device."""

    capture_flop: float
    replay_flop: float
    bytes: int
    gemm_flop_per_second: float

    @property
    def seconds(self) -> float:
        return (self.capture_flop + self.replay_flop) / self.gemm_flop_per_second

    def record(self) -> dict[str, float]:
        return {**asdict(self), "seconds": self.seconds}


def parse_bytes(value: Any, name: str = "memory_budget") -> int | None:
    """Bytes from an int or a text such as "2GiB"; ``name`` is the argument that a message is about.

    Raises:
        InputError: anything else, or not positive.
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if match is None or match[2].upper() not in _UNITS or isinstance(value, bool):
        raise InputError(f"{name}: expected bytes or a text such as '512MiB' or '2GB', got {value!r}")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    check(size > 0, f"{name}: expected more than 0 bytes, got {value!r}")
    return size


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device (on the CPU also within the control group's limit)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return 4 * 2**30  # no way to ask without a further dependency (macOS): a cautious constant
    free = int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1]) * 1024  # type: ignore[index]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def stored_prefix(sites: ModelSites, batch: Batch) -> int:
    """Tokens at the start of all prompts that are computed once and kept; 0 where that cannot be or does not pay."""
    length = batch.common_prefix if capture.takes_trees(sites) and len(batch) > 1 else 0
    return length if length >= _MIN_PREFIX else 0


def _used_parameters(sites: ModelSites, module: nn.Module) -> float:
    """Parameters that a token meets in ``module``: of a mixture of experts those of the experts it is sent to."""
    config = sites.config
    known = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    spared = 1 - getattr(config, "num_experts_per_tok", known) / known
    experts = [part for name, part in module.named_modules() if name.rpartition(".")[2] == "experts"]
    return n_parameters(module) - spared * sum(map(n_parameters, experts))


def default_budget(device: torch.device, free: int | None = None) -> int:
    """Bytes that a run takes at most where none are named: half of what is free, on a GPU at most 4 GiB."""
    half = (free_bytes(device) if free is None else free) // 2
    return min(half, _ENOUGH_BYTES.get(device.type, half))


@functools.lru_cache(maxsize=8)
def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a GEMM, measured once per device and dtype (some ten milliseconds).

    As a linear layer runs it, rows times a transposed weight: in 16 bits on a CPU without instructions for them a
    product of two matrices as they lie is far slower (bench/NOTES.md, weights that stay in their files).
    """
    rows, n = (4096, 4096) if device.type == "cuda" else (512, 1024)
    # nothing random: that would change the state of the generator
    x, weight = (torch.full((size, n), 0.5, dtype=dtype, device=device) for size in (rows, n))
    best = float("inf")
    for _ in range(3):
        _synchronise(device)
        start = time.perf_counter()
        x @ weight.t()
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * n**2 / best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Planner:
    """Costs of a run on one batch.

    Attributes:
        params: parameters of all blocks that a token meets.
    """

    def __init__(self, sites: ModelSites, replay: Replay, batch: Batch, prefix: int, mlps: bool) -> None:
        self.sites, self.replay, self.prefix = sites, replay, prefix
        self.pair = pair_tokens(batch, prefix, capture.takes_trees(sites))
        # prompts of similar length side by side, the longest first: where ranks share them, the last blocks are short
        self.order = self.pair.argsort(stable=True, descending=True)
        self.n = len(batch)
        self._stored = capture.bytes_per_prompt(sites, mlps)
        width = max((m.width or m.held for m in replay.mlps), default=0) or 8 * sites.d_model
        used = [_used_parameters(sites, b.mlp) for b in sites.blocks]
        self._mlp_params, self._last_mlp = sum(used) / sites.n_layers, used[-1]
        self.params = sum(_used_parameters(sites, b.block) for b in sites.blocks)
        self._dense = scratch_bytes(sites.model)
        size = sites.dtype.itemsize
        # a Hugging Face MLP holds gate, activation, up and their product at once; attention holds q, k, v twice (RoPE)
        self._per_token = size * (8 * sites.d_model + 2 * width)
        scores = sites.n_heads if sites.attention == "eager" else 0
        # mask: two dtypes per window kind while it is made; eager attention also holds two copies of its scores
        self._per_key = size * (len(set(sites.windows)) + 2 * scores) + 6
        kv = sites.n_layers * 4 * sites.n_heads * sites.d_head * size
        self._prefix_bytes = prefix * (kv + self._per_token) + prefix**2 * self._per_key if prefix else 0

    def _capture_bytes(self, tokens: int) -> int:
        tokens = max(tokens, int(self.pair.max()))
        return tokens * self._per_token + tokens * self._keys(tokens) * self._per_key

    def _keys(self, tokens: int) -> int:
        """Keys that a mask holds for each of the tokens of one forward pass."""
        longest = int(self.pair.max())
        return self.prefix + (max(tokens, longest) if self.prefix else longest)

    def bytes(self, plan: Plan) -> int:
        """Peak bytes of a plan beyond the model: the stored captures, and the larger of capture and replay."""
        rows = self.replay.n_variants * plan.prompts
        block = max(plan.rows, plan.prompts)
        post = 2 * (self.sites.n_heads + 1) * plan.prompts * self.sites.d_model * self.sites.row_dtype.itemsize
        read = max(2 * plan.prompts, block if self.replay.log_probs else 0)
        vocabulary = self.replay.unembed.scratch_bytes(read, self.sites.row_dtype)
        replayed = rows * self.replay.bytes_per_row() + post
        replayed += max(block * self.replay.bytes_per_work_row(), vocabulary)
        tokens = plan.prompts * int(self.pair.max())
        captured = self._capture_bytes(min(plan.tokens, tokens))
        kept = self._prefix_bytes + self._dense + plan.prompts * self._stored
        if self.sites.stream is None:
            return kept + max(replayed, captured)
        # layer by layer both are alive, and so are hidden states and masks of all groups
        keys = self._keys(min(plan.tokens, tokens)) * len(set(self.sites.windows))
        return kept + replayed + captured + tokens * self.sites.dtype.itemsize * (self.sites.d_model + keys)

    def plan(self, budget: int | None, ranks: int = 1) -> Plan:
        """The largest useful blocks within the budget (None: half of what is free, on a GPU at most 4 GiB).

        Several ranks get smaller blocks, so that each takes some of them and they end together.

        Raises:
            MemoryBudgetError: not even one prompt fits; the message says the smallest budget that works.
        """
        kind = self.sites.device.type
        if budget is None:
            budget = default_budget(self.sites.device)
        most = _MAX_PROMPTS if ranks == 1 else min(_MAX_PROMPTS, max(_MIN_SHARED, -(-self.n // (_TURNS * ranks))))
        tokens = _MAX_PREFIXED_TOKENS if self.prefix else _MAX_TOKENS
        plan = Plan(min(self.n, most), tokens.get(kind, tokens["cpu"]), _MAX_ROWS.get(kind, _MAX_ROWS["cpu"]))
        # the three sizes cost differently; shrink what is dearest relative to what it buys
        longest = int(self.pair.max())
        while self.bytes(plan) > budget:
            options = [
                replace(plan, prompts=max(1, plan.prompts * 3 // 4)) if plan.prompts > 1 else plan,
                replace(plan, tokens=plan.tokens // 2) if plan.tokens > longest else plan,
                replace(plan, rows=plan.rows // 2) if plan.rows > 1 else plan,
            ]
            smaller = [option for option in options if self.bytes(option) < self.bytes(plan)]
            if not smaller:
                raise MemoryBudgetError(
                    f"memory_budget: expected at least {self.bytes(plan)} bytes (one pair of {longest} tokens), "
                    f"got {budget}; raise the budget or shorten the prompts"
                )
            plan = min(smaller, key=self.bytes)
        # equal blocks: 100 prompts at most 64 at a time go as 50 + 50
        return replace(plan, prompts=-(-self.n // -(-self.n // plan.prompts)))

    def forecast(self, plan: Plan, rate: float | None = None) -> Forecast:
        """FLOP of the matrix products, peak bytes, and seconds at ``rate`` FLOP per second (None: measured here)."""
        tokens = self.prefix
        for groups in self.groups(plan, self.order):
            # behind a stored prefix nothing is padded
            tokens += sum(int(self.pair[g].sum() if self.prefix else self.pair[g].max() * len(g)) for g in groups)
        replayed = 0.0 if self.replay.frozen else 2.0 * self._mlp_params * self.replay.n_rows * self.n
        return Forecast(
            capture_flop=2.0 * (self.params - self._last_mlp) * tokens,
            replay_flop=replayed,
            bytes=self.bytes(plan),
            gemm_flop_per_second=rate or gemm_rate(self.sites.device, self.sites.dtype),
        )

    def groups(self, plan: Plan, order: Tensor) -> list[list[Tensor]]:
        """Blocks of prompt indices; within a block, groups that go through one forward pass."""
        blocks = []
        for block in order.split(plan.prompts):
            groups: list[Tensor] = []
            current: list[int] = []
            total = longest = 0
            for i in block.tolist():
                length = int(self.pair[i])
                # behind a stored prefix pairs stand one after the other, otherwise in rows of the longest
                tokens = total + length if self.prefix else max(longest, length) * (len(current) + 1)
                if current and tokens > plan.tokens:
                    groups.append(torch.tensor(current))
                    current, total, longest = [], 0, 0
                current.append(i)
                total, longest = total + length, max(longest, length)
            groups.append(torch.tensor(current))
            blocks.append(groups)
        return blocks
