"""Token layouts that compute what clean and corrupted prompts share only once.

A pair becomes a tree: [shared start | rest of clean | rest of corrupted], in one row of the model's own
forward pass, with the positions of the two prompts and an attention mask in which the two ends do not
see each other. Where all prompts share a start that is stored once (keys and values of one sequence),
the pairs of a block stand one after the other in a single row, so that the stored copy is never repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyarith.engine.batch import Batch

_PAD = -1
_SHARED, _CLEAN, _CORRUPTED = 0, 1, 2


@dataclass(frozen=True)
class Packed:
    """Inputs of one forward pass.

    Attributes:
        input_ids, position_ids: int64 [row, pos].
        pair, branch: int64 [row, pos]; pair -1 marks padding.
        clean_end, corrupted_end: int64 [pair], flat indices into [row * pos].
        prefix: number of stored tokens in front of every row.
        padding: int64 [row, pos], 1 for real tokens, in the plain layout; None for trees.
    """

    input_ids: Tensor
    position_ids: Tensor
    pair: Tensor
    branch: Tensor
    clean_end: Tensor
    corrupted_end: Tensor
    prefix: int
    padding: Tensor | None = None

    def to(self, device: torch.device) -> Packed:
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Packed(**moved)

    def allowed(self, window: int | None) -> Tensor:
        """bool [row, 1, pos, prefix + pos]: which keys a token may attend to."""
        position, pair, branch = self.position_ids, self.pair, self.branch
        same_pair = pair[:, :, None] == pair[:, None, :]
        visible = (branch[:, None, :] == _SHARED) | (branch[:, None, :] == branch[:, :, None])
        distance = position[:, :, None] - position[:, None, :]
        own = same_pair & visible & (distance >= 0)
        stored = torch.ones(*position.shape, self.prefix, dtype=torch.bool, device=position.device)
        if window is not None:
            own &= distance < window
            stored = position[:, :, None] - torch.arange(self.prefix, device=position.device) < window
        return torch.cat([stored, own], -1)[:, None]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, the dtype's lowest value elsewhere (what both eager and sdpa attention add)."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def causal(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [1, 1, length, length], causal with an optional sliding window."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    return allowed[None, None]


def pair_tokens(batch: Batch, prefix: int, trees: bool) -> Tensor:
    """int64 [batch]: tokens that a pair occupies behind the stored prefix."""
    return 2 * batch.lengths - (batch.shared + prefix if trees else 0)


def pack_plain(batch: Batch, indices: Tensor) -> Packed:
    """Clean and corrupted prompts as rows of their own, for attention kernels that take no mask of ours."""
    lengths = batch.lengths[indices].repeat(2)
    width = int(lengths.max())
    ids = torch.cat([batch.clean[indices, :width], batch.corrupted[indices, :width]])
    padding = (torch.arange(width) < lengths[:, None]).long()
    positions = (padding.cumsum(1) - 1).clamp_min(0)
    end = torch.arange(len(ids)) * width + lengths - 1
    clean_end, corrupted_end = end.chunk(2)
    pair = torch.arange(len(indices)).repeat(2)[:, None].expand_as(ids)
    return Packed(ids, positions, pair, torch.zeros_like(ids), clean_end, corrupted_end, 0, padding)


def pack(batch: Batch, indices: Tensor, prefix: int) -> Packed:
    """Lay out the pairs ``indices`` as trees: one row per pair, or a single row when a prefix is stored."""
    ids, positions, pairs, branches, ends = [], [], [], [], []
    for number, i in enumerate(indices.tolist()):
        length, shared = int(batch.lengths[i]), int(batch.shared[i])
        ids.append(torch.cat([batch.clean[i, prefix:length], batch.corrupted[i, shared:length]]))
        positions.append(torch.cat([torch.arange(prefix, length), torch.arange(shared, length)]))
        branch = torch.full((len(ids[-1]),), _CLEAN)
        branch[: shared - prefix] = _SHARED
        branch[length - prefix :] = _CORRUPTED
        branches.append(branch)
        pairs.append(torch.full((len(branch),), number))
        ends.append((length - prefix - 1, len(branch) - 1))
    end = torch.tensor(ends)
    if prefix:
        start = torch.tensor([0, *(len(p) for p in pairs[:-1])]).cumsum(0)
        ids_row, positions_row, pairs_row, branches_row = (
            torch.cat(parts)[None] for parts in (ids, positions, pairs, branches)
        )
    else:
        width = max(map(len, ids))
        start = torch.arange(len(ids)) * width
        ids_row, positions_row, pairs_row, branches_row = (
            torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)
            for parts, value in ((ids, 0), (positions, 0), (pairs, _PAD), (branches, _SHARED))
        )
    return Packed(ids_row, positions_row, pairs_row, branches_row, start + end[:, 0], start + end[:, 1], prefix)
