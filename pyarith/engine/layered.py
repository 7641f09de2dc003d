"""One pass over the weights for a whole block of prompts: layer by layer, capture of all groups, then the replay.

What a model's decoder hands to its blocks (masks, positions, the cache) is found by running it with blocks that do
nothing; the blocks themselves then run one after the other, each for all groups of prompts, and the rows that start at
a layer go through its MLP while its weights are there. The numbers are those of ``capture`` and ``Replay.run``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyarith.engine.batch import Batch
from pyarith.engine.capture import Captured, LastMlp, Prefix, finish, masks_for, packed_for, recording, run_decoder
from pyarith.engine.clock import mark, seconds
from pyarith.engine.packing import Packed, causal
from pyarith.engine.phases import phase
from pyarith.engine.readout import RowLogits
from pyarith.engine.replay import Replay
from pyarith.models.sites import ModelSites


@dataclass
class _Group:
    """Pairs that go through the blocks together: their hidden states, and what each block is called with besides."""

    packed: Packed
    at: slice
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    hidden: Tensor


def sweep(
    sites: ModelSites,
    batch: Batch,
    groups: list[Tensor],
    prefix: Prefix,
    captured: Captured,
    replay: Replay,
    targets: Tensor,
    row_block: int,
    timings: dict[str, float],
) -> RowLogits:
    """Fill ``captured`` with the pairs of ``groups`` and replay them; returns the logits of all rows.

    Args:
        groups: indices into the batch, each group a forward pass; in this order they fill ``captured``.
        targets: int64 [batch, target] of all pairs, on the model's device.
        timings: seconds are added to "capture" and "replay".
    """
    steps, captures = replay.steps(captured, targets, row_block), _capture(sites, batch, groups, prefix, captured)
    needed = next(steps)
    while True:
        start = mark(sites.device)
        with phase("capture"):
            have = next(captures)
        middle = mark(sites.device)
        with phase("replay"):
            try:
                while needed <= have:
                    needed = next(steps)
            except StopIteration as end:
                logits: RowLogits = end.value
                return logits
            finally:
                timings["capture"] += seconds(start, middle)
                timings["replay"] += seconds(middle, mark(sites.device))


def _capture(sites: ModelSites, batch: Batch, groups: list[Tensor], prefix: Prefix, into: Captured) -> Iterator[int]:
    """Yields j when block j is captured but for its MLP's write, n_layers when all is."""
    tuples = _returns_tuple(sites)
    running, at = [], 0
    for group in groups:
        running.append(
            _start(sites, packed_for(sites, batch, group, prefix), slice(at, at + len(group)), prefix, tuples)
        )
        at += len(group)
    last_layer = sites.n_layers - 1
    for layer, block in enumerate(sites.blocks):
        for one in running:
            args, kwargs = one.calls[layer]
            with recording(sites, one.packed, into, one.at, [layer]) as last, suppress(LastMlp):
                if args:
                    output = block.block(one.hidden, *args[1:], **kwargs)
                else:
                    output = block.block(**{**kwargs, "hidden_states": one.hidden})
                one.hidden = output[0] if tuples else output
            prefix.forget(one.packed.input_ids.shape[1], layer)
            if layer == last_layer:
                finish(sites, last, into, one.at)
        yield layer
    yield sites.n_layers


def _start(sites: ModelSites, packed: Packed, at: slice, prefix: Prefix, tuples: bool) -> _Group:
    masks = masks_for(sites, packed.allowed) if packed.padding is None else packed.padding
    with _idle_blocks(sites, tuples) as calls:
        run_decoder(sites, packed.input_ids, packed.position_ids, masks, prefix.cache)
    args, kwargs = calls[0]
    return _Group(packed, at, calls, args[0] if args else kwargs["hidden_states"])


@contextmanager
def _idle_blocks(sites: ModelSites, tuples: bool) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Blocks that hand their input on. Yields the list of what each is called with."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if tuples else hidden

    blocks = [block.block for block in sites.blocks]
    with sites.stream.paused():
        try:
            for block in blocks:
                block.forward = forward
            yield calls
        finally:
            for block in blocks:
                vars(block).pop("forward", None)


class _Seen(Exception):
    """Raised when the first block has returned."""


def _returns_tuple(sites: ModelSites) -> bool:
    """Whether the blocks of this model return tuples, from one token through the first of them."""
    found: list[bool] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        found.append(isinstance(output, tuple))
        raise _Seen

    handle = sites.blocks[0].block.register_forward_hook(look)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=sites.device)
    try:
        with suppress(_Seen):
            run_decoder(sites, ids, ids, masks_for(sites, lambda window: causal(1, window, sites.device)), None)
    finally:
        handle.remove()
    return found[0]
