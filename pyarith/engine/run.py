"""A patching run over one batch: plan, prefix, capture, replay, block by block, results on the host."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyarith.engine import layered, oracle
from pyarith.engine.batch import Batch
from pyarith.engine.capture import Captured, Prefix, allocate, capture
from pyarith.engine.clock import mark, seconds
from pyarith.engine.collect import Array, Collector, Options
from pyarith.engine.memory import is_out_of_memory, smaller
from pyarith.engine.oracle import Sender
from pyarith.engine.phases import label, phase
from pyarith.engine.planner import Plan, Planner, default_budget, free_bytes, stored_prefix
from pyarith.engine.plans import Plans, begun
from pyarith.engine.readout import Readout, RowLogits
from pyarith.engine.replay import Replay
from pyarith.engine.routing import has_routers, tolerated
from pyarith.engine.store import Part, Store
from pyarith.errors import SelfCheckError
from pyarith.models.sites import ModelSites

_VERIFY_PROMPTS = 2


@dataclass
class RunArrays:
    """Host arrays named as the fields of ``PatchResult``, and the record of the run."""

    arrays: dict[str, np.ndarray[Any, Any]]
    verification_error: float | None = None
    record: dict[str, Any] = field(default_factory=dict)


def run(sites: ModelSites, batch: Batch, options: Options) -> RunArrays:
    """Replay every sender on ``batch``. The caller holds ``guard.untouched``."""
    replay = Replay(
        sites,
        options.backend,
        heads=options.heads,
        mlps=options.mlps,
        frozen=options.frozen,
        log_probs=options.log_probs,
    )
    start = time.perf_counter()
    with phase("self-check"):
        oracle.attach(sites, replay, batch)
    checked = time.perf_counter() - start  # its numbers are on the host: nothing is still queued
    length = stored_prefix(sites, batch)
    planner = Planner(sites, replay, batch, length, options.mlps)
    sweep = _Sweep(sites, batch, replay, planner, options)
    sweep.run()
    plan, timings = sweep.plans.last, sweep.timings
    result = RunArrays(
        sweep.collector.arrays,
        record={
            "plan": vars(plan),
            "prefix": length,
            "forecast": planner.forecast(plan).record(),
            "fused": replay.fused,
            "rows": replay.n_rows * len(batch),
            "seconds": {"self-check": checked, **timings},
            **({"rerouted": sweep.collector.rerouted} if has_routers(sites) else {}),
            **({"ranks": options.team.size} if options.team.size > 1 else {}),
            **({} if options.parts.folder is None else {"resumed_blocks": sweep.resumed}),
        },
    )
    if options.verify:
        start = time.perf_counter()
        result.verification_error = _verify(sites, batch, result.arrays, options)
        result.record["seconds"]["verify"] = time.perf_counter() - start
    return result


class _Sweep:
    """All blocks of a run, each computed by one rank or found among the parts of an earlier run.

    After an out-of-memory a rank goes on with half the block sizes, from the block that failed.
    """

    def __init__(self, sites: ModelSites, batch: Batch, replay: Replay, planner: Planner, options: Options) -> None:
        self.sites, self.batch, self.replay, self.planner, self.options = sites, batch, replay, planner, options
        self.collector = Collector(sites, replay, batch, options)
        self.timings = {"capture": 0.0, "replay": 0.0}
        self.resumed = 0
        self.plans = _plans(planner, options)
        self._blocks = planner.order.split(self.plans.first.prompts)
        self._prefix: Prefix | None = None

    def run(self) -> None:
        """Fill the collector."""
        done = 0
        for number, part in self.options.team.share(len(self._blocks), self._compute):
            self.collector.put(self._blocks[number], part.arrays)
            self.resumed += part.record["found"]
            done += len(self._blocks[number])
            self.options.progress(done)
        self.replay.release()

    def _compute(self, number: int) -> Part:
        start = sum(map(len, self._blocks[:number]))
        while True:
            plan = self.plans.at(start)
            parts = self._parts(plan, number)
            found = parts.get("block")
            if found is not None:
                return Part(found.arrays, {"found": True})
            try:
                arrays = self._arrays(plan, self._blocks[number])
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self.plans.change(start, smaller(plan, self.sites, error))
                self.replay.release()
                # made anew when the error no longer keeps the failed block's tensors alive
                self._prefix = None
                continue
            parts.put(("block",), arrays)
            return Part(arrays, {"found": False})

    def _parts(self, plan: Plan, number: int) -> Store:
        return self.options.parts.under(lambda: [vars(plan), self._blocks[number]])

    def _arrays(self, plan: Plan, block: Tensor) -> dict[str, Array]:
        """What ``Collector.read`` gives for a block; smaller ones, where memory ran out, are put together."""
        if self._prefix is None:
            start = mark(self.sites.device)
            with phase("prefix"):
                self._prefix = Prefix(self.sites, self.batch.clean[0, : self.planner.prefix])
            self.timings["capture"] += seconds(start, mark(self.sites.device))
        found = []
        for groups in self.planner.groups(plan, block):
            done = _block(self.sites, self.batch, self.replay, self._prefix, groups, plan, self.options, self.timings)
            found.append(self.collector.read(torch.cat(groups), *done))
        return found[0] if len(found) == 1 else {name: np.concatenate([f[name] for f in found], 1) for name in found[0]}


def _plans(planner: Planner, options: Options) -> Plans[Plan]:
    """The plans of an interrupted run where its blocks still fit, else one for what is free on every rank."""
    team, device, given = options.team, planner.sites.device, options.memory_budget
    key = ("plans", given)
    processes = team.neighbours if device.type == "cpu" else 1
    limit = min(team.gather(lambda: free_bytes(device) // processes)) if given is None else given

    history = team.tell(
        lambda: begun(
            options.parts,
            key,
            lambda sizes: planner.bytes(Plan(*sizes)) <= limit,
            lambda: planner.plan(given if given is not None else default_budget(device, limit), team.size),
        )
    )
    return Plans(options.parts, key, Plan, history)


def _block(
    sites: ModelSites,
    batch: Batch,
    replay: Replay,
    prefix: Prefix,
    groups: list[Tensor],
    plan: Plan,
    options: Options,
    timings: dict[str, float],
) -> tuple[Captured, RowLogits, Readout]:
    block = torch.cat(groups)
    targets = batch.targets[block].to(sites.device)
    readout = Readout(sites, replay.final_norm, replay.unembed, targets, replay.backend)
    captured = allocate(sites, len(block), options.mlps)
    for name, tensor in captured.named():
        label(f"captured {name}", tensor)
    if sites.stream is not None:
        rows = layered.sweep(sites, batch, groups, prefix, captured, replay, targets, plan.rows, timings)
        return captured, rows, readout
    start = mark(sites.device)
    with phase("capture"):
        at = 0
        for group in groups:
            capture(sites, batch, group, prefix, captured, slice(at, at + len(group)))
            at += len(group)
    middle = mark(sites.device)
    with phase("replay"):
        rows = replay.run(captured, targets, plan.rows)
    end = mark(sites.device)
    timings["capture"] += seconds(start, middle)
    timings["replay"] += seconds(middle, end)
    return captured, rows, readout


@phase("verify")
def _verify(sites: ModelSites, batch: Batch, arrays: dict[str, np.ndarray[Any, Any]], options: Options) -> float:
    """Literal re-runs of the strongest senders and of senders spread over the model, on at most two prompts.

    Raises:
        SelfCheckError: replay and literal re-run disagree beyond rounding.
    """
    prompts = range(min(_VERIFY_PROMPTS, len(batch)))
    worst = 0.0
    floor = float(arrays["noise_floor"].max())
    for sender in _choose(sites, arrays, options):
        if sender.head is not None:
            replayed = arrays["head_logits"][sender.layer, sender.head]
        else:
            replayed = arrays["mlp_logits"][sender.layer]
        for i in prompts:
            n = int(batch.lengths[i])
            found = oracle.literal(
                sites, batch.clean[i, :n], batch.corrupted[i, :n], int(batch.targets[i, 0]), sender, options.frozen
            )
            error = abs(found - float(replayed[i]))
            worst = max(worst, error)
            tolerance = oracle.tolerance(sites, max(abs(found), 1.0)) + 4 * floor
            if not error <= tolerance:
                what = f"head {sender.layer}.{sender.head}" if sender.head is not None else f"MLP {sender.layer}"
                if _went_elsewhere(sites, batch, i, sender, options):
                    warnings.warn(
                        f"verification: family {sites.spec.name!r}, {what}, prompt {i}: rounding to {sites.dtype} sent "
                        f"the replayed row and a literal re-run to different experts; their logits differ by "
                        f"{error:.2g}, tolerated in 16 bits. Load the model in fp32 for effects smaller than that",
                        UserWarning,
                        stacklevel=2,
                    )
                    continue
                raise SelfCheckError(
                    f"verification: family {sites.spec.name!r}, {what}, prompt {i}: a literal re-run gives logit "
                    f"{found:.6g}, the replay {float(replayed[i]):.6g} (tolerance {tolerance:.2g}); no result is given"
                )
    return worst


def _went_elsewhere(sites: ModelSites, batch: Batch, prompt: int, sender: Sender, options: Options) -> bool:
    """Whether experts chosen by rounding explain that replay and literal re-run disagree."""
    if options.frozen or not (tolerated(sites) and has_routers(sites)):
        return False
    return oracle.went_elsewhere(sites, batch, prompt, sender, options.backend)


def _choose(sites: ModelSites, arrays: dict[str, np.ndarray[Any, Any]], options: Options) -> list[Sender]:
    """``verify`` senders: the strongest head, the strongest MLP, the next head, ..."""
    ranked: list[list[Sender]] = []
    if options.heads:
        change = np.abs(arrays["head_logits"] - arrays["identity_logits"][:, None]).mean(-1)
        order = np.argsort(-change, axis=None)[: options.verify]
        ranked.append([Sender(*map(int, np.unravel_index(i, change.shape))) for i in order])
    if options.mlps:
        change = np.abs(arrays["mlp_logits"] - arrays["mlp_identity_logits"]).mean(-1)
        ranked.append([Sender(int(i), None) for i in np.argsort(-change)[: options.verify]])
    longest = max(map(len, ranked))
    mixed = [kind[i] for i in range(longest) for kind in ranked if i < len(kind)]
    return mixed[: options.verify]
