"""What a sweep needs of the intact model: block inputs, the arguments that the decoder passes to its blocks, END's
logits, and for END-only sweeps the keys and values of the prompts.

Prompts are left-aligned: padding stands behind END, where causal attention does not let it reach END. So no argument
of a block depends on a prompt, only on positions: in an all-position sweep the arguments come from one prompt and
broadcast over all of them; in an END-only sweep positions differ by prompt, and so do the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyarith.engine.capture import run_decoder
from pyarith.engine.guard import Hooks
from pyarith.models.sites import ModelSites


@dataclass(frozen=True)
class Arguments:
    """What a block gets besides its hidden states.

    Attributes:
        args, kwargs: as the decoder passed them; tensors of two and more axes begin with [rows].
        rows: number of prompts they were made for; 1 broadcasts.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int

    def repeated(self, variants: int) -> Arguments:
        """The same for ``variants`` copies of the prompts, one after the other."""
        if self.rows == 1 or variants == 1:
            return self
        args, kwargs = (_repeat(part, self.rows, variants) for part in (self.args, self.kwargs))
        return Arguments(args, kwargs, self.rows * variants)

    def call(self, block: nn.Module, hidden: Tensor) -> Any:
        return block(hidden, *self.args, **self.kwargs)


def _repeat(value: Any, rows: int, variants: int) -> Any:
    if isinstance(value, Tensor):
        if value.dim() < 2 or len(value) != rows:
            return value
        return value.expand(variants, *value.shape).reshape(variants * rows, *value.shape[1:])
    if isinstance(value, tuple | list):
        return type(value)(_repeat(item, rows, variants) for item in value)
    if isinstance(value, dict):
        return {key: _repeat(item, rows, variants) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class Clean:
    """A block of prompts as the intact model sees them.

    Attributes:
        indices: int64 [batch] on the host, which prompts these are.
        lengths: int64 [batch] on the model's device; END stands at ``lengths - 1``.
        start: {layer: block input [batch, pos, d_model] in row dtype}; layer 0, and where later passes start. In an
            END-only sweep ``pos`` is END alone.
        arguments: of each block.
        hidden: [batch, d_model] decoder output at END, model dtype.
        keys, values: per layer [batch, pos, kv_head, d_head] (END-only sweeps), else empty.
    """

    indices: Tensor
    lengths: Tensor
    start: dict[int, Tensor]
    arguments: list[Arguments]
    hidden: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def batch(self) -> int:
        return len(self.indices)

    @property
    def pos(self) -> int:
        return self.start[0].shape[1]

    @property
    def ends(self) -> Tensor:
        """int64 [batch]: where END stands on the axis ``pos``."""
        return self.lengths - 1 if self.pos > 1 else torch.zeros_like(self.lengths)


@contextmanager
def _arguments(sites: ModelSites, rows: int) -> Iterator[list[Arguments]]:
    """Collects what the decoder passes to each block while it runs."""
    found: list[Arguments] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        found.append(Arguments(args[1:], rest, rows))

    handles = [block.block.register_forward_pre_hook(keep, with_kwargs=True) for block in sites.blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _run(sites: ModelSites, ids: Tensor, positions: Tensor, cache: Any = None) -> tuple[Tensor, Tensor]:
    """(input of the first block, decoder output), both [batch, pos, d_model]."""
    seen: list[Tensor] = []

    def keep(x: Tensor) -> None:
        seen.append(x)

    with Hooks() as hooks:
        hooks.before(sites.blocks[0].block, keep)
        hooks.after(sites.final_norm, keep)
        run_decoder(sites, ids, positions, None, cache)
    return seen[0], seen[1]


def _at(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b]]: [batch, pos, d_model] -> [batch, d_model]."""
    return x[torch.arange(len(index), device=x.device), index]


def prepare_all(sites: ModelSites, ids: Tensor, lengths: Tensor, indices: Tensor) -> Clean:
    """One forward pass of the model over prompts [batch, pos], for a sweep at all positions."""
    ids, lengths = ids.to(sites.device), lengths.to(sites.device)
    positions = torch.arange(ids.shape[1], device=sites.device)[None]
    with _arguments(sites, 1) as arguments:
        parts = [_run(sites, ids[:1], positions)]
    if len(ids) > 1:
        parts.append(_run(sites, ids[1:], positions.expand(len(ids) - 1, -1)))
    start, output = (torch.cat(pair) for pair in zip(*parts, strict=True))
    hidden = _at(output, lengths - 1)
    return Clean(indices, lengths, {0: start.to(sites.row_dtype)}, arguments, hidden, [], [])


def prepare_end(sites: ModelSites, ids: Tensor, lengths: Tensor, indices: Tensor) -> Clean:
    """One forward pass that keeps keys and values, and one over END alone for the arguments of the blocks there."""
    from transformers import DynamicCache

    ids, lengths = ids.to(sites.device), lengths.to(sites.device)
    cache = DynamicCache()  # without a config every layer keeps all keys; the attention below knows the windows
    positions = torch.arange(ids.shape[1], device=sites.device).expand_as(ids)
    _, output = _run(sites, ids, positions, cache)
    hidden = _at(output, lengths - 1)
    end = (lengths - 1)[:, None]
    with _arguments(sites, len(ids)) as arguments:
        start, _ = _run(sites, ids.gather(1, end), end)
    keys, values = ([part.transpose(1, 2) for part in parts] for parts in zip(*map(_stored, cache.layers), strict=True))
    return Clean(indices, lengths, {0: start.to(sites.row_dtype)}, arguments, hidden, keys, values)


def _stored(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


Prepare = Callable[[ModelSites, Tensor, Tensor, Tensor], Clean]
