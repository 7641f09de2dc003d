"""Replay: every sender becomes one row of the residual stream at END, carried through the MLPs to the logit.

With all other heads frozen nothing moves between positions (SEMANTICS, "the replay identity"):

    row(l, h) = base[l] + (z_corrupted[l, h] - z_clean[l, h]) @ W_O[l][:, h].T
    row      += MLP_l(norm(row));   for j > l:  row += attn_write_clean[j];  row += MLP_j(norm(row))
    logit     = final_norm(row) . W_U[answer]

Rows start at *entries*. Serial block: entry j lies before MLP j and takes the heads of layer j, MLP j - 1 and
an identity row. Parallel block: entry j lies before block j and takes the heads and the MLP of block j - 1. Entry
n_layers lies before the final norm. All rows of one entry share one clean base, so an effect is the difference
of two rows that went through the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyarith import ops
from pyarith.engine.capture import Captured
from pyarith.engine.guard import output_of
from pyarith.engine.phases import label
from pyarith.engine.readout import Norm, Readout, RowLogits, read_unembed, split, split_norm
from pyarith.engine.routing import Rerouted, routed_width
from pyarith.models.quantised import held_width
from pyarith.models.sites import ModelSites
from pyarith.models.weights import HeadOutputs, read_mlp

# True = all heads, False = none, or the heads of each layer in rising order
Heads = bool | tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Entry:
    """Rows that start at one place: ``[heads of head_layer][MLP mlp_layer][identity]`` from variant ``start`` on."""

    head_layer: int | None
    mlp_layer: int | None
    start: int
    heads: tuple[int, ...]

    @property
    def mlp_row(self) -> int:
        return self.start + len(self.heads)

    @property
    def identity_row(self) -> int:
        return self.mlp_row + (self.mlp_layer is not None)

    @property
    def stop(self) -> int:
        return self.identity_row + 1


def heads_by_layer(sites: ModelSites, heads: Heads) -> tuple[tuple[int, ...], ...]:
    """The heads that are run, layer by layer."""
    if isinstance(heads, bool):
        return (tuple(range(sites.n_heads)) if heads else (),) * sites.n_layers
    return heads


def entry_plan(sites: ModelSites, heads: tuple[tuple[int, ...], ...], mlps: bool) -> list[Entry | None]:
    """Entries 0 .. n_layers; None where nothing starts."""
    plan: list[Entry | None] = []
    start = 0
    for j in range(sites.n_layers + 1):
        head_layer = j - 1 if sites.parallel else j
        head = head_layer if 0 <= head_layer < sites.n_layers and heads[head_layer] else None
        mlp = j - 1 if mlps and j >= 1 else None
        if head is None and mlp is None:
            plan.append(None)
            continue
        entry = Entry(head, mlp, start, () if head is None else heads[head])
        plan.append(entry)
        start = entry.stop
    return plan


def frozen_entries(sites: ModelSites, heads: tuple[tuple[int, ...], ...], mlps: bool) -> list[Entry]:
    """With later MLPs frozen every sender starts before the final norm; one entry per layer, replayed alone."""
    layers = [layer for layer in range(sites.n_layers) if mlps or heads[layer]]
    return [Entry(i if heads[i] else None, i if mlps else None, 0, heads[i]) for i in layers]


class Mlp:
    """``target = mlp(x)`` or ``target += scale * mlp(x)``, fused where the MLP is a known pattern."""

    def __init__(self, sites: ModelSites, module: nn.Module, backend: str) -> None:
        self.module, self.backend, self.scale = module, backend, sites.residual_scale
        self.weights = read_mlp(sites, module)
        self._routed = routed_width(sites, module) if self.weights is None else 0

    @property
    def width(self) -> int:
        return self.weights.width if self.weights is not None else 0

    @property
    def held(self) -> int:
        """Columns per row that the own module of a quantised MLP or of a mixture of experts holds at once, else 0."""
        return held_width(self.module) or self._routed if self.weights is None else 0

    @property
    def bias(self) -> Tensor | None:
        """The bias, scaled, that ``add_to`` leaves to its caller."""
        bias = self.weights.down.bias if self.weights is not None else None
        return bias if bias is None or self.scale == 1.0 else bias * self.scale

    def _hidden(self, x: Tensor, work: Tensor) -> Tensor:
        w = self.weights
        assert w is not None
        n = len(x)
        gate = work[: n * w.gate.matrix.shape[1]].view(n, -1)
        w.gate.apply(x, gate)
        if w.fused:
            gate, up = gate.chunk(2, dim=-1)
            hidden = gate
        elif w.up is not None:
            up = work[gate.numel() : n * w.width].view(n, -1)
            w.up.apply(x, up)
            hidden = gate
        else:
            up, hidden = None, gate
        return ops.gated_act(gate, up, w.act, out=hidden, backend=self.backend)

    def write_to(self, x: Tensor, target: Tensor, work: Tensor) -> None:
        """``target = mlp(x)``; x and target [variant, batch, d_model]."""
        if self.weights is None:
            target.copy_(output_of(self.module, x))
            return
        flat = x.flatten(0, 1)
        self.weights.down.apply(self._hidden(flat, work), target.flatten(0, 1))

    def add_to(self, x: Tensor, rows: Tensor, work: Tensor) -> None:
        """``rows += scale * mlp(x) - bias`` in the GEMM itself; the caller owes ``bias``."""
        if self.weights is None:
            rows.add_(output_of(self.module, x), alpha=self.scale)
            return
        flat = rows.flatten(0, 1)
        hidden = self._hidden(x.flatten(0, 1), work)
        torch.addmm(flat, hidden, self.weights.down.matrix, alpha=self.scale, out=flat)


class Replay:
    """The replay of one model; buffers are made once and reused for every block of prompts."""

    def __init__(
        self, sites: ModelSites, backend: str, *, heads: Heads, mlps: bool, frozen: bool, log_probs: bool
    ) -> None:
        self.sites, self.backend, self.frozen, self.log_probs = sites, backend, frozen, log_probs
        self.heads = heads_by_layer(sites, heads)
        self.entries = entry_plan(sites, self.heads, mlps)
        self.frozen_entries = frozen_entries(sites, self.heads, mlps)
        self.w_o = HeadOutputs(sites) if heads else ()
        self.attn_post = [self._optional_norm(block.attn_post_norm) for block in sites.blocks]
        self.mlp_norms = [Norm(sites, block.mlp_norm, backend) for block in sites.blocks]
        self.mlps = [Mlp(sites, block.mlp, backend) for block in sites.blocks]
        self.mlp_post = [self._optional_norm(block.mlp_post_norm) for block in sites.blocks]
        self.final_norm = Norm(sites, sites.final_norm, backend)
        self.unembed = read_unembed(sites)
        # rows in the GEMM's own dtype take the MLP's result in the GEMM; otherwise it waits for the next add_norm
        self.direct = sites.dtype == sites.row_dtype and self.mlp_post[0] is None
        self.rerouted = Rerouted(sites, [None if entry is None else entry.identity_row for entry in self.entries])
        self._work: dict[tuple[str, torch.device], Tensor] = {}

    def _optional_norm(self, module: nn.Module | None) -> Norm | None:
        return None if module is None else Norm(self.sites, module, self.backend)

    @property
    def n_variants(self) -> int:
        """Rows per prompt that are alive at once."""
        if self.frozen:
            return max(entry.stop for entry in self.frozen_entries)
        return max(entry.stop for entry in self.entries if entry)

    @property
    def n_rows(self) -> int:
        """Rows per prompt summed over what they pass: the MLPs, or with these frozen the final norm."""
        if self.frozen:
            return sum(entry.stop for entry in self.frozen_entries)
        alive = rows = 0
        for entry in self.entries[: self.sites.n_layers]:
            alive = entry.stop if entry else alive
            rows += alive
        return rows

    @property
    def fused(self) -> bool:
        return all(m.weights is not None for m in self.mlps)

    def bytes_per_row(self) -> int:
        """Bytes per row and prompt that live through a sweep."""
        sites = self.sites
        waiting = 0 if self.direct else sites.dtype.itemsize
        return sites.d_model * (sites.row_dtype.itemsize + waiting)

    def bytes_per_work_row(self) -> int:
        """Bytes per row of a row block: norm output, MLP intermediates, and one row for a norm after the MLP."""
        sites = self.sites
        width = max(m.width or m.held for m in self.mlps) or 4 * sites.d_model
        return sites.dtype.itemsize * (sites.d_model + width) + sites.row_dtype.itemsize * sites.d_model

    def _buffer(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        device = self.sites.device if device is None else device
        size, key = torch.Size(shape).numel(), (name, device)
        have = self._work.get(key)
        if have is None or have.numel() < size or have.dtype != dtype:
            self._work.pop(key, None)  # free before the larger one is made
            have = self._work[key] = torch.empty(size, dtype=dtype, device=device)
            label(f"replay {name}", have)
        return have[:size].view(shape)

    def _reserve(self, variants: int, batch: int) -> None:
        """Make the buffers of a row block at their final size: grown layer by layer, old and new would coexist."""
        width = max(m.width for m in self.mlps)
        for device in {*self.sites.devices, self.sites.device}:
            self._buffer("x", (variants, batch, self.sites.d_model), self.sites.dtype, device)
            if width and not self.frozen:
                self._buffer("work", (variants * batch * width,), self.sites.dtype, device)

    def release(self) -> None:
        self._work.clear()

    # one block of prompts

    def run(self, captured: Captured, targets: Tensor, row_block: int) -> RowLogits:
        """Logits of all rows for a block of prompts; targets int64 [batch, target] on the model's device."""
        steps = self.steps(captured, targets, row_block)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                logits: RowLogits = end.value
                return logits

    def steps(self, captured: Captured, targets: Tensor, row_block: int) -> Generator[int, None, RowLogits]:
        """The same, entry by entry: yields j where block j must be captured up to its MLP, n_layers where all must."""
        sites = self.sites
        batch = len(targets)
        rows = self._rows(batch, sites.device if self.frozen else sites.devices[0])
        per_block = max(1, row_block // batch)
        self._reserve(min(per_block, self.n_variants), batch)
        readout = Readout(sites, self.final_norm, self.unembed, targets, self.backend)
        if self.frozen:
            yield sites.n_layers
            base = captured.base[sites.n_layers]
            parts = [self._frozen(entry, rows, base, captured, readout, per_block) for entry in self.frozen_entries]
            return RowLogits.cat(parts)
        self.rerouted.begin(captured.routes)
        alive, owed = 0, None
        for j, entry in enumerate(self.entries):
            yield j
            before = alive
            rows = self._travel(rows, alive, sites.devices[j] if j < sites.n_layers else sites.device)
            if entry is not None:
                self._enter(entry, rows, captured.base[j], captured)
                alive = entry.stop
            write = self._incoming(captured, j, owed, rows.device)
            if j < sites.n_layers and alive:
                sites.ready(j)
                owed = self._advance(j, rows, before, alive, write, per_block)
        return self._read(readout, rows, before, alive, write, self._waiting(rows), per_block)

    def _rows(self, batch: int, device: torch.device) -> Tensor:
        return self._buffer("rows", (self.n_variants, batch, self.sites.d_model), self.sites.row_dtype, device)

    def _travel(self, rows: Tensor, alive: int, device: torch.device) -> Tensor:
        """Rows on the device of their next layer, with what waits to be added to them."""
        if rows.device == device:
            return rows
        there = self._rows(rows.shape[1], device)
        there[:alive].copy_(rows[:alive])
        waiting, waiting_there = self._waiting(rows), self._waiting(there)
        if waiting is not None and waiting_there is not None:
            waiting_there[:alive].copy_(waiting[:alive])
        return there

    def _incoming(self, captured: Captured, j: int, owed: Tensor | None, device: torch.device) -> Tensor | None:
        """What rows that entered before entry j meet there: the frozen attention write, and the owed MLP bias."""
        source = j - 1 if self.sites.parallel else j
        write = captured.writes[source].to(device) if 0 <= source < self.sites.n_layers else None
        if owed is None:
            return write
        owed = owed.to(device, self.sites.row_dtype).expand(captured.base.shape[1:])
        return owed.contiguous() if write is None else write + owed

    def _waiting(self, rows: Tensor) -> Tensor | None:
        return None if self.direct else self._buffer("waiting", tuple(rows.shape), self.sites.dtype, rows.device)

    def _enter(self, entry: Entry, rows: Tensor, base: Tensor, captured: Captured) -> None:
        sites, device = self.sites, rows.device
        identity, base = rows[entry.identity_row], base.to(device)
        identity.copy_(base)
        if entry.head_layer is not None:
            layer = entry.head_layer
            sites.ready(layer)
            dz = captured.dz[layer].to(device).unflatten(-1, (sites.n_heads, sites.d_head))
            w_o = self.w_o[layer].to(device)
            if len(entry.heads) < sites.n_heads:
                chosen = torch.tensor(entry.heads, device=device)
                dz, w_o = dz[:, chosen], w_o[chosen]
            senders = rows[entry.start : entry.mlp_row]
            post = self.attn_post[layer]
            if post is None:
                ops.head_write_rows(base, sites.scaled(dz), w_o, out=senders, backend=self.backend)
            else:
                # the norm after attention is not linear: the whole write is recomputed, for the identity row too
                assert captured.raw is not None and captured.pre is not None
                own, pre = captured.raw[layer].to(device), captured.pre[layer].to(device)
                raw = self._buffer("raw", (len(entry.heads) + 1, *base.shape), sites.row_dtype, device)
                ops.head_write_rows(own, dz, w_o, out=raw[:-1], backend=self.backend)
                raw[-1].copy_(own)
                write = self._buffer("write", tuple(raw.shape), sites.dtype, device)
                post(raw, None, None, write)
                torch.add(pre, write[:-1], alpha=sites.residual_scale, out=senders)
                torch.add(pre, write[-1], alpha=sites.residual_scale, out=identity)
        if entry.mlp_layer is not None:
            assert captured.dmlp is not None
            torch.add(identity, captured.dmlp[entry.mlp_layer].to(device), out=rows[entry.mlp_row])

    def _advance(
        self, layer: int, rows: Tensor, before: int, alive: int, write: Tensor | None, per_block: int
    ) -> Tensor | None:
        """MLP ``layer`` for rows[:alive]; those below ``before`` first receive ``write``. Returns the bias owed."""
        norm, mlp, post = self.mlp_norms[layer], self.mlps[layer], self.mlp_post[layer]
        waiting = self._waiting(rows)
        for a, b in split(alive, per_block):
            n = (b - a) * rows.shape[1]
            x = self._buffer("x", (b - a, *rows.shape[1:]), self.sites.dtype, rows.device)
            work = self._buffer("work", (n * mlp.width,), self.sites.dtype, rows.device)
            split_norm(norm, rows, a, b, before, waiting, write, x)
            with self.rerouted.watching(layer, a, b):
                if waiting is None:
                    mlp.add_to(x, rows[a:b], work)
                    continue
                mlp.write_to(x, waiting[a:b], work)
            if post is not None:
                raw = self._buffer("post", (b - a, *rows.shape[1:]), rows.dtype, rows.device)
                post(raw.copy_(waiting[a:b]), None, None, waiting[a:b])
            if mlp.scale != 1.0:
                waiting[a:b].mul_(mlp.scale)
        # a copy: when it is due, a streamed layer's buffer may hold another layer
        return mlp.bias.clone() if waiting is None and mlp.bias is not None else None

    def identity_layer(self, entry: Entry) -> int | None:
        """The layer whose effects are measured against the identity row of ``entry``."""
        if entry.head_layer is not None:
            return entry.head_layer
        return entry.mlp_layer if entry.mlp_layer is not None and not self.heads[entry.mlp_layer] else None

    def _read(
        self,
        readout: Readout,
        rows: Tensor,
        before: int,
        alive: int,
        write: Tensor | None,
        waiting: Tensor | None,
        per_block: int,
    ) -> RowLogits:
        parts = []
        for a, b in split(alive, per_block):
            x = self._buffer("x", (b - a, *rows.shape[1:]), self.sites.dtype, rows.device)
            parts.append(readout.read(rows, a, b, before, waiting, write, x, self.log_probs))
        return RowLogits.cat(parts)

    def _frozen(
        self, entry: Entry, rows: Tensor, base: Tensor, captured: Captured, readout: Readout, per_block: int
    ) -> RowLogits:
        """All senders of one layer with every later MLP frozen: their change is added to the clean final residual."""
        self._enter(entry, rows, base, captured)
        if entry.head_layer is not None and self.attn_post[entry.head_layer] is not None:
            # the entry was built as pre + norm(raw); move from there to the final residual, identity included
            rows[: entry.stop].add_(base - rows[entry.identity_row])
        return self._read(readout, rows, 0, entry.stop, None, None, per_block)
