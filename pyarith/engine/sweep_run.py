"""A sweep, block by block: the intact model on a block of prompts, then all sets in chunks."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pyarith.ablation_result import Ablation
from pyarith.engine import oracle
from pyarith.engine.clock import mark, seconds
from pyarith.engine.memory import is_out_of_memory, smaller
from pyarith.engine.replay import Replay
from pyarith.engine.sweep_collect import Collector, Options, Prompts
from pyarith.engine.sweep_end import SharedPrefix, shared_prefix
from pyarith.engine.sweep_inputs import prepare_all, prepare_end
from pyarith.engine.sweep_layers import Carrier, Values, make_chunks
from pyarith.engine.sweep_plan import SweepPlan, SweepPlanner
from pyarith.engine.sweep_verify import verify as verify_literally
from pyarith.models.sites import ModelSites


def run(
    sites: ModelSites, prompts: Prompts, sets: tuple[Ablation, ...], options: Options
) -> tuple[dict[str, Any], float | None, dict[str, Any]]:
    """All blocks of prompts, with half the block size after each out-of-memory."""
    replay = Replay(sites, options.backend, heads=True, mlps=False, frozen=False, log_probs=False)
    oracle.attach(sites, replay, prompts.batch())
    planner = SweepPlanner(sites, replay, prompts.lengths, sets, options.end)
    plan = planner.plan(options.memory_budget)
    collector = Collector(sites, replay, prompts, len(sets), options)
    timings = {"clean": 0.0, "ablated": 0.0}
    order = prompts.lengths.argsort(stable=True)  # prompts of similar length side by side
    done = 0
    with Carrier(sites, replay, options.backends) as carrier:
        while done < len(order):
            try:
                for block in order[done:].split(plan.prompts):
                    collector.done = done * len(sets)  # a block that ran out of memory is counted anew
                    _block(carrier, prompts, sets, block, plan, collector, timings)
                    done += len(block)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                plan = smaller(plan, sites, error)
                replay.release()
    record = {"plan": vars(plan), "forecast": planner.forecast(plan).record(), "seconds": timings}
    verified = None
    if options.verify:
        start = time.perf_counter()
        verified = verify_literally(
            sites,
            prompts.ids,
            prompts.lengths,
            prompts.targets[:, 0],
            sets,
            collector.arrays,
            options.baseline,
            options.end,
            options.verify,
        )
        timings["verify"] = time.perf_counter() - start
    return collector.arrays, verified, record


def _block(
    carrier: Carrier,
    prompts: Prompts,
    sets: tuple[Ablation, ...],
    block: Tensor,
    plan: SweepPlan,
    collector: Collector,
    timings: dict[str, float],
) -> None:
    """All sets on a block of prompts."""
    sites, options = carrier.sites, collector.options
    start = mark(sites.device)
    lengths = prompts.lengths[block]
    prepare = prepare_end if options.end else prepare_all
    # the hooks of the carrier are idle while it carries nothing
    clean = prepare(sites, prompts.ids[block, : int(lengths.max())], lengths, block)
    middle = mark(sites.device)
    prefix = SharedPrefix(sites, clean, options.backends["shared_prefix_attention"]) if options.end else None
    values = Values(sites, options.baseline, clean)
    collector.own(clean)
    chunks = make_chunks(sites, sets, plan.sets)
    keep = {int(chunk.first[0]) for chunk in chunks[1:]}
    with shared_prefix(sites, prefix) if prefix is not None else nullcontext():
        for chunk in chunks:
            rows = carrier.run(clean, chunk, values, plan.tokens, keep, prefix)
            collector.add(clean, chunk, rows)
    timings["clean"] += seconds(start, middle)
    timings["ablated"] += seconds(middle, mark(sites.device))
