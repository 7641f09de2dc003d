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
from pyarith.engine.planner import free_bytes
from pyarith.engine.plans import Plans, begun
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
    plans = _plans(planner, options)
    collector = Collector(sites, replay, prompts, len(sets), options)
    timings = {"clean": 0.0, "ablated": 0.0}
    order = prompts.lengths.argsort(stable=True)  # prompts of similar length side by side
    done = 0
    with Carrier(sites, replay, options.backends) as carrier:
        while done < len(order):
            plan = plans.at(done)
            block = order[done : done + plan.prompts]
            collector.done = done * len(sets)  # a block that ran out of memory is counted anew
            try:
                _block(carrier, prompts, sets, block, plan, collector, timings)
                done += len(block)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                plans.change(done, smaller(plan, sites, error))
                replay.release()
    plan = plans.at(done)
    record: dict[str, Any] = {"plan": vars(plan), "forecast": planner.forecast(plan).record(), "seconds": timings}
    if options.parts.folder is not None:
        record["resumed_parts"] = collector.resumed
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


def _plans(planner: SweepPlanner, options: Options) -> Plans[SweepPlan]:
    """The plans of an interrupted run where its blocks still fit, else one for what is free."""
    key = ("plans", options.memory_budget)
    limit = free_bytes(planner.sites.device) if options.memory_budget is None else options.memory_budget
    history = begun(
        options.parts,
        key,
        lambda sizes: planner.bytes(SweepPlan(*sizes)) <= limit,
        lambda: planner.plan(options.memory_budget),
    )
    return Plans(options.parts, key, SweepPlan, history)


def _block(
    carrier: Carrier,
    prompts: Prompts,
    sets: tuple[Ablation, ...],
    block: Tensor,
    plan: SweepPlan,
    collector: Collector,
    timings: dict[str, float],
) -> None:
    """All sets on a block of prompts, as far as they are not among the parts of an earlier run."""
    sites, options = carrier.sites, collector.options
    chunks = make_chunks(sites, sets, plan.sets)
    keep = {int(chunk.first[0]) for chunk in chunks[1:]}
    parts = options.parts.under(lambda: [vars(plan), block])
    own, starts = parts.get("clean"), parts.get("starts")
    found = [parts.get("sets", chunk.indices) for chunk in chunks]
    if keep and starts is None:
        found[0] = None  # the later chunks start from what it keeps on its way
    collector.resumed += len(found) - found.count(None)
    if own is not None and None not in found:
        collector.put_own(block, own.arrays)
        for chunk, part in zip(chunks, found, strict=True):
            assert part is not None
            collector.put(block, chunk, part.arrays)
        return
    start = mark(sites.device)
    lengths = prompts.lengths[block]
    prepare = prepare_end if options.end else prepare_all
    # the hooks of the carrier are idle while it carries nothing
    clean = prepare(sites, prompts.ids[block, : int(lengths.max())], lengths, block)
    middle = mark(sites.device)
    prefix = SharedPrefix(sites, clean, options.backends["shared_prefix_attention"]) if options.end else None
    values = Values(sites, options.baseline, clean)
    logits = collector.own(clean)
    parts.put(("clean",), logits)
    collector.put_own(block, logits)
    if found[0] is not None and starts is not None:
        clean.start.update({int(layer): torch.from_numpy(x).to(sites.device) for layer, x in starts.arrays.items()})
    with shared_prefix(sites, prefix) if prefix is not None else nullcontext():
        for chunk, part in zip(chunks, found, strict=True):
            if part is not None:
                collector.put(block, chunk, part.arrays)
                continue
            rows = carrier.run(clean, chunk, values, plan.tokens, keep, prefix)
            arrays = collector.read(clean, chunk, rows, logits["logits"][:, 0])
            if chunk is chunks[0] and keep:
                parts.put(("starts",), {str(layer): clean.start[layer].cpu().numpy() for layer in sorted(keep)})
            parts.put(("sets", chunk.indices), arrays)
            collector.put(block, chunk, arrays)
    timings["clean"] += seconds(start, middle)
    timings["ablated"] += seconds(middle, mark(sites.device))
