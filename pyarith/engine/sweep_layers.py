"""Variants of one block of prompts, carried through the layers together.

    layer l, variants that are alive:  row += attention_l(row), z of ablated heads := baseline
                                       row += MLP_l(norm(row)), write of an ablated MLP := baseline
    layer l, sets that start there:    row  = clean residual after attention
                                              + sum over ablated heads (baseline - z_clean) @ W_O[:, h].T
                                       then MLP_l as above
    END after the last layer:          logit = final_norm(row) . W_U[answer]

Row 0 is the identity: nothing is ablated, and it gives z and the residual stream of the clean run to the sets that
start at each layer, so that nothing of the clean run is kept but the block input. Attention is the model's own: each
block is called with the arguments that the decoder passed in the clean run, and left once attention has written.
Norms and MLPs are the fused ops of the replay, or the model's own modules where they are not the known pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyarith import ops
from pyarith.ablation_result import Ablation
from pyarith.engine.baselines import Baseline, values_at
from pyarith.engine.guard import Hooks
from pyarith.engine.readout import split
from pyarith.engine.replay import Replay
from pyarith.engine.sweep_end import SharedPrefix
from pyarith.engine.sweep_inputs import Arguments, Clean
from pyarith.models.sites import ModelSites


class _Written(Exception):
    """Raised where attention has written: the rest of the block is ours."""


@dataclass(frozen=True)
class Chunk:
    """Sets that go through the layers together, in the order of their first layers.

    Attributes:
        indices: which sets of the sweep.
        first: int64 [set].
        heads: bool [1 + set, n_layers, n_heads] what is ablated; row 0 is the identity.
        mlps: bool [1 + set, n_layers].
        on_device: ``heads`` as a tensor on the model's device.
    """

    indices: NDArray[np.int64]
    first: NDArray[np.int64]
    heads: NDArray[np.bool_]
    mlps: NDArray[np.bool_]
    on_device: Tensor

    def __len__(self) -> int:
        return len(self.indices)


def make_chunks(sites: ModelSites, sets: tuple[Ablation, ...], size: int) -> list[Chunk]:
    """All sets, ordered by first layer, in equal chunks of at most ``size``."""
    first = np.array([s.first_layer for s in sets])
    order = np.argsort(first, kind="stable")
    chunks = []
    for a, b in split(len(sets), size):
        heads = np.zeros((1 + b - a, sites.n_layers, sites.n_heads), bool)
        mlps = np.zeros((1 + b - a, sites.n_layers), bool)
        for row, index in enumerate(order[a:b], 1):
            for head in sets[index].heads:
                heads[row, head.layer, head.head] = True
            mlps[row, list(sets[index].mlps)] = True
        on_device = torch.from_numpy(heads).to(sites.device)
        chunks.append(Chunk(order[a:b], first[order[a:b]], heads, mlps, on_device))
    return chunks


@dataclass
class _Attention:
    """One call of a block: what the hooks are told, and what they leave.

    Attributes:
        variants: copies of the prompts in this call.
        ablated: bool [variant, head], or None.
        values: what ablated heads get, [batch or 1, pos or 1, head, d_head], None for zero.
        ends: where END stands, if only END shall pass the output projection; else None.
        identity: keep what variant 0 had.
        backend: of ``ablate_heads``.
    """

    variants: int
    batch: int
    ablated: Tensor | None
    values: Tensor | None
    ends: Tensor | None
    identity: bool
    backend: str
    z: Tensor | None = None  # [batch, pos, n_heads * d_head] of variant 0
    write: Tensor | None = None  # [variant * batch, pos, d_model]


@dataclass(frozen=True)
class _Identity:
    """Clean values at one layer for the sets that start there, [batch, pos, ...]; rows in row dtype."""

    z: Tensor
    pre: Tensor
    write: Tensor
    post: Tensor  # after the block


class Values:
    """A baseline's values for a block of prompts."""

    def __init__(self, sites: ModelSites, baseline: Baseline, clean: Clean) -> None:
        self.sites, self.baseline, self.clean = sites, baseline, clean

    def heads(self, layer: int, end: bool) -> Tensor | None:
        """[batch or 1, pos or 1, head, d_head]; END alone where ``end``."""
        return self._pick(self.baseline.head_values(self.sites, layer), end)

    def mlps(self, layer: int, end: bool) -> Tensor | None:
        """[batch or 1, pos or 1, d_model]."""
        return self._pick(self.baseline.mlp_values(self.sites, layer), end)

    def _pick(self, values: Tensor | None, end: bool) -> Tensor | None:
        if values is None:
            return None
        if len(values) > 1:
            values = values[self.clean.indices.to(values.device)]
        if self.baseline.lengths is None or values.shape[1] == 1:
            return values
        if end or self.clean.pos == 1:
            return values_at(values, (self.clean.lengths - 1)[:, None])
        return values[:, : self.clean.pos]


class Carrier:
    """Carries chunks of sets through the layers; buffers are made once and reused."""

    def __init__(self, sites: ModelSites, replay: Replay, backends: Mapping[str, str]) -> None:
        self.sites, self.replay, self.backends = sites, replay, backends
        self._now: _Attention | None = None
        self._hooks = Hooks()

    def __enter__(self) -> Carrier:
        def on_z(x: Tensor) -> Tensor | None:
            return None if self._now is None else _change_z(self._now, x, self.sites)

        def on_write(x: Tensor) -> None:
            if self._now is not None:
                self._now.write = x
                raise _Written

        for block in self.sites.blocks:
            self._hooks.before(block.o_proj, on_z)
            self._hooks.after(block.attn_write, on_write)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()
        self.replay.release()

    # one chunk

    def run(
        self,
        clean: Clean,
        chunk: Chunk,
        values: Values,
        tokens: int,
        keep: set[int],
        prefix: SharedPrefix | None = None,
    ) -> Tensor:
        """Residual rows at END after the last block, [1 + set, batch, d_model] in row dtype.

        Args:
            tokens: rows [variant, batch, pos] that go through a block at once, at most (but at least one variant).
            keep: layers at whose start the clean run is kept in ``clean.start``, for later chunks.
            prefix: in an END-only sweep.
        """
        sites, last = self.sites, self.sites.n_layers - 1
        from_layer = max(layer for layer in clean.start if layer <= chunk.first[0])
        n_full = 1 + int((chunk.first < last).sum())
        buffer = self.replay._buffer
        rows = buffer("rows", (n_full, clean.batch, clean.pos, sites.d_model), sites.row_dtype)
        final = buffer("final", (1 + len(chunk), clean.batch, 1, sites.d_model), sites.row_dtype)
        rows[0] = clean.start[from_layer]
        alive = 1
        for layer in range(from_layer, last + 1):
            if layer in keep and layer not in clean.start:
                clean.start[layer] = rows[0].clone()
            if prefix is not None:
                prefix.layer = layer
            target = final if layer == last else rows
            stop = 1 + int((chunk.first <= layer).sum())
            identity = None
            for a, b in split(alive, self._variants(clean, clean.pos, tokens)):
                found = self._block(layer, rows[a:b], target[a:b], clean, chunk, values, a, stop > alive)
                identity = identity or found
            if stop > alive:
                assert identity is not None
                self._enter(layer, identity, target[alive:stop], clean, chunk, values, alive, tokens)
            alive = stop
        return final[:, :, 0]

    def _variants(self, clean: Clean, pos: int, tokens: int) -> int:
        return max(1, tokens // (clean.batch * pos))

    def _block(
        self,
        layer: int,
        rows: Tensor,
        target: Tensor,
        clean: Clean,
        chunk: Chunk,
        values: Values,
        a: int,
        wanted: bool,
    ) -> _Identity | None:
        """Rows [variant, batch, pos, d_model] through one block into ``target`` (rows themselves, or END of them)."""
        end = layer == self.sites.n_layers - 1
        n = len(rows)
        some = bool(chunk.heads[a : a + n, layer].any())
        keep = wanted and a == 0
        now = _Attention(
            n,
            clean.batch,
            chunk.on_device[a : a + n, layer] if some else None,
            values.heads(layer, end=False) if some else None,
            clean.ends if end else None,
            keep,
            self.backends["ablate_heads"],
        )
        self._attend(layer, rows, clean.arguments[layer], now)
        assert now.write is not None
        written = self.sites.scaled(now.write)
        if end:
            target.copy_(rows[:, torch.arange(clean.batch, device=rows.device), clean.ends][:, :, None])
        found = None
        if keep:
            assert now.z is not None
            write = written[: clean.batch].to(target.dtype)
            found = _Identity(now.z, target[0].clone(), write, target[0])
        self._mlp(layer, target, written.view(target.shape), chunk.mlps[a : a + n, layer], values)
        return found

    def _attend(self, layer: int, rows: Tensor, arguments: Arguments, now: _Attention) -> None:
        hidden = rows.flatten(0, 1).to(self.sites.dtype)
        self._now = now
        try:
            with suppress(_Written):
                arguments.repeated(now.variants).call(self.sites.blocks[layer].block, hidden)
        finally:
            self._now = None

    def _mlp(self, layer: int, rows: Tensor, write: Tensor | None, ablated: NDArray[np.bool_], values: Values) -> None:
        """rows += write; rows += scale * MLP(norm(rows)), (parallel: of rows before); [variant, batch, pos, d_model].

        ``write`` is scaled already, the baseline of an ablated MLP is not.
        """
        replay, sites = self.replay, self.sites
        norm, mlp, post = replay.mlp_norms[layer], replay.mlps[layer], replay.mlp_post[layer]
        flat = rows.flatten(1, 2)
        if write is not None:
            write = write.flatten(1, 2)
        if ablated.all():
            if write is not None:
                flat.add_(write)
            self._add_baseline(layer, rows, values)
            return
        x = replay._buffer("x", tuple(flat.shape), sites.dtype)
        work = replay._buffer("work", (flat.shape[0] * flat.shape[1] * mlp.width,), sites.dtype)
        norm(flat, None if sites.parallel else write, None, x)
        if replay.direct and not ablated.any():
            mlp.add_to(x, flat, work)
            if mlp.bias is not None:
                flat.add_(mlp.bias)
        else:
            waiting = replay._buffer("waiting", tuple(flat.shape), sites.dtype)
            mlp.write_to(x, waiting, work)
            if post is not None:
                raw = replay._buffer("post", tuple(flat.shape), rows.dtype)
                post(raw.copy_(waiting), None, None, waiting)
            index = torch.from_numpy(ablated.nonzero()[0]).to(rows.device)
            if len(index):
                value = values.mlps(layer, end=rows.shape[2] == 1)
                shape = (len(index), *rows.shape[1:])
                new = waiting.new_zeros(()) if value is None else value
                waiting.view(rows.shape)[index] = new.expand(shape).to(waiting.dtype)
            flat.add_(sites.scaled(waiting))
        if sites.parallel and write is not None:
            flat.add_(write)

    def _add_baseline(self, layer: int, rows: Tensor, values: Values) -> None:
        value = values.mlps(layer, end=rows.shape[2] == 1)
        if value is not None:
            rows.add_(self.sites.scaled(value))

    # sets that start at a layer

    def _enter(
        self,
        layer: int,
        identity: _Identity,
        rows: Tensor,
        clean: Clean,
        chunk: Chunk,
        values: Values,
        a: int,
        tokens: int,
    ) -> None:
        """Rows [set, batch, pos, d_model] of the sets that start at ``layer``: after its attention, then its MLP."""
        heads, mlps = chunk.heads[a : a + len(rows), layer], chunk.mlps[a : a + len(rows), layer]
        value = values.heads(layer, end=rows.shape[2] == 1) if heads.any() else None
        z = identity.z.unflatten(-1, (self.sites.n_heads, self.sites.d_head))
        dz = (-z.to(rows.dtype) if value is None else value.to(rows.dtype) - z).flatten(0, 1)
        base = identity.post if self.sites.parallel else identity.pre + identity.write
        for i, j in split(len(rows), self._variants(clean, rows.shape[2], tokens)):
            part = rows[i:j]
            if self.sites.blocks[layer].attn_post_norm is None:
                self._head_writes(layer, base.flatten(0, 1), self.sites.scaled(dz), heads[i:j], part.flatten(1, 2))
            else:
                written = self._normed_writes(layer, z, value, heads[i:j])
                torch.add(self.sites.scaled(written), identity.pre, out=part)
            if not self.sites.parallel:
                self._mlp(layer, part, None, mlps[i:j], values)
            elif mlps[i:j].any():
                # the MLP of a parallel block does not see what its attention wrote: it is the clean one, or ablated
                index = torch.from_numpy(mlps[i:j].nonzero()[0]).to(rows.device)
                change = identity.pre + identity.write - identity.post
                ablated = values.mlps(layer, end=rows.shape[2] == 1)
                part[index] += change if ablated is None else change + self.sites.scaled(ablated)

    def _head_writes(self, layer: int, base: Tensor, dz: Tensor, heads: NDArray[np.bool_], out: Tensor) -> None:
        """out[set] = base + sum over the set's heads of dz[:, h] @ W_O[:, h].T; dz [tokens, head, d_head]."""
        w_o = self.replay.w_o[layer]
        if bool((heads.sum(1) == 1).all()):  # one head each: only its own columns of W_O
            which = heads.argmax(1)
            if not np.array_equal(which, np.arange(len(w_o))):
                index = torch.from_numpy(which).to(dz.device)
                dz, w_o = dz.index_select(1, index), w_o.index_select(0, index)
            ops.head_write_rows(base, dz, w_o, out=out, backend=self.backends["head_write_rows"])
            return
        chosen = torch.from_numpy(heads).to(dz.device)[:, None, :, None]
        masked = torch.where(chosen, dz, 0.0).flatten(0, 1).flatten(-2)
        torch.mm(masked, w_o.flatten(0, 1).to(out.dtype), out=out.flatten(0, 1))
        out.add_(base)

    def _normed_writes(self, layer: int, z: Tensor, value: Tensor | None, heads: NDArray[np.bool_]) -> Tensor:
        """What attention adds where a norm follows its projection: not linear in z, so that all of it is recomputed.

        z [batch, pos, head, d_head] of the clean run; returns [set, batch, pos, d_model] in the model's dtype. (Added
        to the clean sum instead, heads that are most of it would leave its rounding error, scaled up by the norm.)
        """
        block, chosen = self.sites.blocks[layer], torch.from_numpy(heads).to(z.device)
        changed = ops.ablate_heads(z.expand(len(heads), *z.shape), chosen, value, backend=self.backends["ablate_heads"])
        return block.attn_write(block.o_proj(changed.flatten(-2)))


def _change_z(now: _Attention, x: Tensor, sites: ModelSites) -> Tensor | None:
    """z [variant * batch, pos, n_heads * d_head] on its way to the output projection."""
    if now.ablated is not None:
        z = x.view(now.variants, now.batch, x.shape[1], sites.n_heads, sites.d_head)
        ops.ablate_heads(z, now.ablated, now.values, out=z, backend=now.backend)
    if now.ends is not None and x.shape[1] > 1:
        z = x.unflatten(0, (now.variants, now.batch))
        x = z[:, torch.arange(now.batch, device=x.device), now.ends].flatten(0, 1)[:, None]
    if now.identity:
        now.z = x[: now.batch]
    return x
