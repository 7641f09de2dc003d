"""From a memory budget to the block sizes of a sweep, with a forecast."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from pyarith.ablation_result import Ablation
from pyarith.engine.planner import Forecast, free_bytes, gemm_rate
from pyarith.engine.replay import Replay
from pyarith.errors import MemoryBudgetError
from pyarith.models.sites import ModelSites

# Tokens that go through a block at once: GEMMs are on their plateau, intermediates still in the cache.
_MAX_TOKENS = {"cpu": 2048, "cuda": 16384}
# Each chunk of sets carries an identity of its own; beyond this many sets it costs next to nothing.
_MANY_SETS = 32
_ENOUGH_BYTES = {"cuda": 16 * 2**30}


@dataclass(frozen=True)
class SweepPlan:
    """Block sizes: prompts at once, sets carried through the layers at once, tokens per call of a block."""

    prompts: int
    sets: int
    tokens: int

    def halved(self) -> SweepPlan | None:
        """Half of everything, or None when nothing is left to halve."""
        half = SweepPlan(max(1, self.prompts // 2), max(1, self.sets // 2), max(1, self.tokens // 2))
        return None if half == self else half


class SweepPlanner:
    """Costs of a sweep over sets and prompts."""

    def __init__(
        self, sites: ModelSites, replay: Replay, lengths: Tensor, sets: tuple[Ablation, ...], end: bool
    ) -> None:
        self.sites, self.replay, self.sets, self.end = sites, replay, sets, end
        self.lengths = lengths
        self.longest = int(lengths.max())
        self.first = np.array([s.first_layer for s in sets])
        size, width = sites.dtype.itemsize, max(m.width or m.held for m in replay.mlps) or 8 * sites.d_model
        # attention holds q, k, v twice (rotary embedding), z and its write; the MLP of the intact model gate, up, both
        self._attention = size * 10 * max(sites.d_model, sites.n_heads * sites.d_head)
        self._clean = self._attention + size * 3 * width
        self._scores = sites.n_heads * (4 if sites.attention == "eager" or end else 0) * max(size, 4)
        block = sum(p.numel() for p in sites.blocks[0].block.parameters())
        mlp = sum(p.numel() for p in sites.blocks[0].mlp.parameters())
        self._flop = (2.0 * block, 2.0 * mlp)

    def bytes(self, plan: SweepPlan) -> int:
        """Peak bytes of a plan beyond the model."""
        sites = self.sites
        row = sites.d_model * sites.row_dtype.itemsize
        tokens = plan.prompts * self.longest
        pos = 1 if self.end else self.longest
        carried = (1 + plan.sets) * plan.prompts * (pos + 1) * row
        variants = min(1 + plan.sets, max(1, plan.tokens // (plan.prompts * pos)))
        work = variants * plan.prompts * pos
        used = work * (self.replay.bytes_per_work_row() + self._attention + row + self.longest * self._scores)
        used += 4 * plan.prompts * pos * row * (1 + sites.n_heads * sites.d_head // sites.d_model)
        clean = tokens * (self._clean + 2 * row + (self.longest * self._scores if sites.attention == "eager" else 0))
        # rotary tables and keys of the clean run; n_heads is the most that there can be of kv heads
        stored = plan.prompts * pos * row
        if self.end:
            # the plain attention over the stored keys holds copies of one layer's in fp32
            used += 4 * 4 * tokens * sites.n_heads * sites.d_head
            stored += 2 * tokens * sites.n_layers * sites.n_heads * sites.d_head * sites.dtype.itemsize
        return stored + max(carried + used, clean)

    def plan(self, budget: int | None) -> SweepPlan:
        """The largest useful blocks within the budget (None: half of what is free, on a GPU at most 16 GiB).

        Raises:
            MemoryBudgetError: not even one prompt and set fit; the message says the smallest budget that works.
        """
        kind = self.sites.device.type
        if budget is None:
            free = free_bytes(self.sites.device) // 2
            budget = min(free, _ENOUGH_BYTES.get(kind, free))
        tokens = _MAX_TOKENS.get(kind, _MAX_TOKENS["cpu"])
        n = len(self.lengths)
        # prompts enough to fill a block by themselves are enough
        plan = SweepPlan(min(n, max(1, tokens // self.longest)), len(self.sets), tokens)
        while self.bytes(plan) > budget:
            smaller = next((option for option in self._smaller(plan) if self.bytes(option) < self.bytes(plan)), None)
            if smaller is None:
                raise MemoryBudgetError(
                    f"memory_budget: expected at least {self.bytes(plan)} bytes (one set and one prompt of "
                    f"{self.longest} tokens), got {budget}; raise the budget or shorten the prompts"
                )
            plan = smaller
        return replace(plan, prompts=-(-n // -(-n // plan.prompts)))

    def _smaller(self, plan: SweepPlan) -> list[SweepPlan]:
        """Plans that may need less, the one that costs least time first."""
        carried = (1 + plan.sets) * plan.prompts * (1 if self.end else self.longest)
        fewer_sets = replace(plan, sets=max(1, plan.sets * 3 // 4))
        options = [replace(plan, prompts=max(1, plan.prompts // 2)), replace(plan, tokens=max(1, plan.tokens // 2))]
        # many sets that fill several calls of a block lose little when they are carried in two parts
        cheap = carried > 4 * plan.tokens and plan.sets > _MANY_SETS
        return [fewer_sets, *options] if cheap else [*options, fewer_sets]

    def forecast(self, plan: SweepPlan) -> Forecast:
        """FLOP of the matrix products, peak bytes, and seconds at the measured GEMM rate."""
        layers, (block, mlp) = self.sites.n_layers, self._flop
        n = len(self.lengths)
        tokens = n if self.end else int(self.lengths.sum())
        early = float((self.first < layers - 1).sum())
        # the MLP of the last layer runs for END alone; in a serial block sets start before an MLP of their own
        later = block * tokens * float((layers - 1 - self.first).sum()) - mlp * (tokens - n) * early
        entering = 0.0 if self.sites.parallel else mlp * (tokens * early + n * (len(self.first) - early))
        identity = block * layers * tokens - mlp * (tokens - n)
        return Forecast(
            capture_flop=block * layers * int(self.lengths.sum()),
            replay_flop=later + entering + identity,
            bytes=self.bytes(plan),
            gemm_flop_per_second=gemm_rate(self.sites.device, self.sites.dtype),
        )
