"""A patching run over one batch: plan, prefix, capture, replay, block by block, results on the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyarith.engine import layered, oracle
from pyarith.engine.batch import Batch, name_prompts
from pyarith.engine.capture import Captured, Prefix, allocate, capture
from pyarith.engine.clock import mark, seconds
from pyarith.engine.memory import is_out_of_memory, smaller
from pyarith.engine.oracle import Sender
from pyarith.engine.phases import label, phase
from pyarith.engine.planner import Plan, Planner, stored_prefix
from pyarith.engine.readout import Readout
from pyarith.engine.replay import Heads, Replay
from pyarith.errors import NonFiniteError, SelfCheckError
from pyarith.models.quantised import plain_tensors
from pyarith.models.sites import ModelSites

_VERIFY_PROMPTS = 2
_METRICS = ("logits", "foil_logits", "log_probs")


@dataclass(frozen=True)
class Options:
    """What a run computes; see ``fast_patch``."""

    heads: Heads = True
    mlps: bool = True
    frozen: bool = False
    log_probs: bool = False
    memory_budget: int | None = None
    backend: str = "auto"
    verify: int = 2
    progress: Callable[[int, int], None] | None = None


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
    with phase("self-check"):
        oracle.attach(sites, replay, batch)
    length = stored_prefix(sites, batch)
    planner = Planner(sites, replay, batch, length, options.mlps)
    plan = planner.plan(options.memory_budget)
    arrays, timings, plan = _sweep(sites, batch, replay, planner, plan, options)
    result = RunArrays(
        arrays,
        record={
            "plan": vars(plan),
            "prefix": length,
            "forecast": planner.forecast(plan).record(),
            "fused": replay.fused,
            "rows": replay.n_rows * len(batch),
            "seconds": timings,
        },
    )
    if options.verify:
        start = time.perf_counter()
        result.verification_error = _verify(sites, batch, result.arrays, options)
        timings["verify"] = time.perf_counter() - start  # its numbers are on the host: nothing is still queued
    return result


def _sweep(
    sites: ModelSites, batch: Batch, replay: Replay, planner: Planner, plan: Plan, options: Options
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, float], Plan]:
    """All blocks, with half the block size after each out-of-memory."""
    order = planner.pair.argsort(stable=True)
    collector = _Collector(sites, replay, batch, options)
    timings = {"capture": 0.0, "replay": 0.0}
    prefix = None
    done = 0
    while done < len(order):
        if prefix is None:
            start = mark(sites.device)
            with phase("prefix"):
                prefix = Prefix(sites, batch.clean[0, : planner.prefix])
            timings["capture"] += seconds(start, mark(sites.device))
        try:
            for groups in planner.groups(plan, order[done:]):
                block = torch.cat(groups)
                collector.add(block, *_block(sites, batch, replay, prefix, groups, plan, options, timings))
                done += len(block)
                if options.progress is not None:
                    options.progress(done, len(order))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            plan = smaller(plan, sites, error)
            replay.release()
            # made anew at the top of the loop, when the error no longer keeps the failed block's tensors alive
            prefix = None
    replay.release()
    return collector.arrays, timings, plan


def _block(
    sites: ModelSites,
    batch: Batch,
    replay: Replay,
    prefix: Prefix,
    groups: list[Tensor],
    plan: Plan,
    options: Options,
    timings: dict[str, float],
) -> tuple[Captured, Any, Readout]:
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


class _Collector:
    """Scatters the rows of blocks into arrays in the order of the prompts."""

    def __init__(self, sites: ModelSites, replay: Replay, batch: Batch, options: Options) -> None:
        self.sites, self.replay, self.batch, self.options = sites, replay, batch, options
        n, layers, foils = len(batch), sites.n_layers, batch.targets.shape[1] - 1
        kind = np.float64 if sites.row_dtype == torch.float64 else np.float32
        senders = {"head": (layers, sites.n_heads), "identity": (layers,), "mlp": (layers,), "mlp_identity": (layers,)}
        if not options.heads:
            del senders["head"], senders["identity"]
        if not options.mlps:
            del senders["mlp"], senders["mlp_identity"]
        both = {"clean": (), "corrupted": ()}
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        for metric in _METRICS:
            wanted = {"logits": True, "foil_logits": foils > 0, "log_probs": options.log_probs}[metric]
            names = {**senders, **both} if wanted else both if metric == "log_probs" else {}
            for name, axes in names.items():
                shape = (*axes, n, foils) if metric == "foil_logits" else (*axes, n)
                self.arrays[f"{name}_{metric}"] = np.full(shape, np.nan, kind)  # heads that are not run stay NaN
        self.arrays["noise_floor"] = np.zeros(layers, kind)

    @phase("readout")
    def add(self, block: Tensor, captured: Captured, rows: Any, readout: Readout) -> None:
        hidden = torch.stack([captured.clean_hidden, captured.corrupted_hidden])
        logits, own, own_lse, *more = _to_host(
            rows.logits,
            readout.of_hidden(hidden),
            readout.log_sum_exp(hidden),
            *([] if rows.lse is None else [rows.lse]),
        )
        lse = more[0] if more else None
        if not (bool(torch.isfinite(logits).all()) and bool(torch.isfinite(own).all())):
            raise NonFiniteError(_first_non_finite(self.sites, captured, block))
        index = block.numpy()
        for i, name in enumerate(("clean", "corrupted")):
            self._put(name, index, own[i], own_lse[i])
        identity = self._put_senders(index, logits, lse, own[0, :, 0])
        drift = (identity - own[0, :, 0]).abs().amax(1).numpy()
        np.maximum(self.arrays["noise_floor"], drift, out=self.arrays["noise_floor"])

    def _put_senders(self, index: Any, logits: Tensor, lse: Tensor | None, own: Tensor) -> Tensor:
        """Store all senders; returns the identity logits [n_layers, batch]."""
        identity = own[None].repeat(self.sites.n_layers, 1)  # a layer without rows has no noise of its own
        replay = self.replay
        start = 0
        for entry in replay.frozen_entries if replay.frozen else replay.entries:
            if entry is None:
                continue
            part = logits[start : start + entry.stop - entry.start]
            part_lse = None if lse is None else lse[start : start + entry.stop - entry.start]
            start += entry.stop - entry.start
            last = part_lse[-1] if part_lse is not None else None
            if entry.mlp_layer is not None:
                row = entry.mlp_row - entry.start
                self._put("mlp", index, part[row], None if part_lse is None else part_lse[row], entry.mlp_layer)
                self._put("mlp_identity", index, part[-1], last, entry.mlp_layer)
                if not replay.heads[entry.mlp_layer]:
                    identity[entry.mlp_layer] = part[-1, :, 0]
            if entry.head_layer is not None:
                rows = slice(0, len(entry.heads))
                values = part[rows], None if part_lse is None else part_lse[rows]
                self._put("head", index, *values, entry.head_layer, entry.heads)
                self._put("identity", index, part[-1], last, entry.head_layer)
                identity[entry.head_layer] = part[-1, :, 0]
        return identity

    def _put(
        self,
        name: str,
        index: Any,
        logits: Tensor,
        lse: Tensor | None,
        layer: int | None = None,
        heads: tuple[int, ...] = (),
    ) -> None:
        """logits [..., batch, target], lse [..., batch]; with ``heads`` the first axis is of these heads."""
        at = () if layer is None else (layer,)
        places: Any = (np.array(heads)[:, None], index) if heads else (..., index)
        values = {"logits": logits[..., 0], "foil_logits": logits[..., 1:]}
        if lse is not None:
            values["log_probs"] = logits[..., 0] - lse
        for metric, value in values.items():
            target = self.arrays.get(f"{name}_{metric}")
            if target is None:
                continue
            place = (*places, slice(None)) if metric == "foil_logits" else places
            target[at][place] = value.numpy()


def _to_host(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one dtype, copied to the host in one transfer."""
    flat = torch.cat([t.flatten() for t in tensors]).cpu()
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def _first_non_finite(sites: ModelSites, captured: Captured, block: Tensor) -> str:
    """Where NaN or infinity came from: weights of the model first, else the first tensor of the run in layer order."""
    parameters = [part for name, whole in sites.weights() for part in plain_tensors(name, whole)]
    for name, parameter in parameters:
        if not bool(torch.isfinite(parameter).all()):
            return f"non-finite values: weight {name} of the model holds NaN or infinity; repair the checkpoint"
    for layer in range(sites.n_layers + 1):
        for name, tensor in captured.named():
            if tensor.dim() == 3 and layer < len(tensor):
                bad = ~torch.isfinite(tensor[layer]).all(-1)
                if bool(bad.any()):
                    prompts = torch.zeros(int(block.max()) + 1, dtype=torch.bool)
                    prompts[block] = bad.cpu()
                    return (
                        f"non-finite values: layer {layer}, tensor {name} (prompts {name_prompts(prompts)}); the model "
                        f"overflows {sites.dtype}: load it in fp32 or bf16"
                    )
    return f"non-finite values: only in replayed rows; patched activations overflow {sites.dtype}: load it in fp32"


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
                raise SelfCheckError(
                    f"verification: family {sites.spec.name!r}, {what}, prompt {i}: a literal re-run gives logit "
                    f"{found:.6g}, the replay {float(replayed[i]):.6g} (tolerance {tolerance:.2g}); no result is given"
                )
    return worst


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
