"""Where a ``PrefixCache`` keeps states: memory within a budget, and a folder behind it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyarith.tuning.prefix_disk import PrefixFolder
from pyarith.tuning.prefix_keys import Row


@dataclass(eq=False)
class Kept:
    """The states of one batch.

    Attributes:
        digest: of the batch.
        rows: its examples; None where it cannot be taken apart.
        in_tuple: whether a block returns its states as a tuple of one, as some versions of transformers do.
        seconds: that computing them took (0 where not known).
        tokens: padding included.
        memory: [batch, pos, d_model] in the dtype that the block gave, or None where only the folder has them.
        ready: event after which ``memory`` is filled, where the copy was only queued.
        on_disk: whether the folder has them.
    """

    digest: str
    rows: tuple[Row, ...] | None
    in_tuple: bool
    seconds: float
    tokens: int
    memory: Tensor | None = None
    ready: torch.cuda.Event | None = None
    on_disk: bool = False


class PrefixStore:
    """States by the digest of their batch, and where each example's states are.

    Args:
        budget: most bytes in memory.
        folder: of which everything kept is written, too; None for none.
        device: where memory is.
        pin: take pinned memory, from which a GPU copies without making the host wait.
    """

    def __init__(self, budget: int, folder: PrefixFolder | None, device: torch.device, pin: bool) -> None:
        self.budget, self.folder, self.device = budget, folder, device
        self.memory_bytes = 0
        self.corrupted = 0
        self.not_kept = 0
        self.batches: dict[str, Kept] = {}
        self._examples: dict[str, tuple[Kept, int]] = {}
        self._pin = pin
        if folder is not None:
            for about in folder.known():
                rows = None if about["rows"] is None else tuple(Row(*row) for row in about["rows"])
                facts = {key: about[key] for key in ("digest", "in_tuple", "seconds", "tokens")}
                self._add(Kept(rows=rows, on_disk=True, **facts))
            self.corrupted = folder.unreadable

    @property
    def measured(self) -> tuple[float, int]:
        """(seconds, tokens) that computing kept states took, where it is known."""
        known = [kept for kept in self.batches.values() if kept.seconds]
        return sum(kept.seconds for kept in known), sum(kept.tokens for kept in known)

    def put(self, kept: Kept, states: Tensor) -> None:
        """Keep the states of a batch where there is room.

        What came first stays: epochs go through the data in turn, and a cache that made room by dropping the oldest
        would then drop each batch just before it is wanted again.
        """
        self._remember(kept, states)
        if self.folder is not None and self.folder.has_room(kept.digest, states.nbytes):
            if kept.memory is not None and kept.memory.device.type == "cpu":
                if kept.ready is not None:
                    kept.ready.synchronize()
                on_host = kept.memory
            else:
                on_host = states.detach().cpu().contiguous()
            about = {name: getattr(kept, name) for name in ("rows", "in_tuple", "seconds", "tokens")}
            kept.on_disk = self.folder.write(kept.digest, on_host, about)
        if kept.memory is None and not kept.on_disk:
            self.not_kept += 1
        else:
            self._add(kept)

    def batch(self, digest: str, device: torch.device) -> tuple[Kept, Tensor] | None:
        """The states of a batch, a new tensor on ``device``; None where they are not here (any more)."""
        kept = self.batches.get(digest)
        source = None if kept is None else self._source(kept)
        if kept is None or source is None:
            return None
        return kept, torch.empty_like(source, device=device).copy_(source, non_blocking=True)

    def assembled(self, rows: Sequence[Row], length: int, device: torch.device) -> tuple[Kept, Tensor] | None:
        """States of a batch put together from its examples, with zeros on padding; None where one is missing."""
        places = [self._examples[row.digest] for row in rows if row.digest in self._examples]
        if not rows or len(places) < len(rows):
            return None
        sources: dict[Kept, Tensor] = {}
        for kept, _ in places:
            if kept not in sources:
                source = self._source(kept)
                if source is None:
                    return None
                sources[kept] = source
        first = places[0][0]
        like = sources[first]
        out = torch.zeros(len(rows), length, like.shape[2], dtype=like.dtype, device=device)
        for number, (row, (kept, at)) in enumerate(zip(rows, places, strict=True)):
            out[number, : row.stop].copy_(sources[kept][at, : row.stop], non_blocking=True)
        return first, out

    def _source(self, kept: Kept) -> Tensor | None:
        """States where they are kept; reading a broken file forgets the batch."""
        if kept.memory is not None:
            if kept.ready is not None:
                kept.ready.wait()
            return kept.memory
        assert self.folder is not None
        states = self.folder.read(kept.digest)
        if states is None:
            self.corrupted += 1
            self._forget(kept)
            return None
        self._remember(kept, states)
        return states if kept.memory is None else kept.memory

    def _remember(self, kept: Kept, states: Tensor) -> None:
        """Copy states into memory if the budget has room."""
        size = states.nbytes
        if self._pin:
            size = 1 << (size - 1).bit_length()  # torch takes pinned memory in powers of two
        if self.memory_bytes + size > self.budget:
            return
        memory = self._empty(states).copy_(states, non_blocking=True)
        if states.device.type == "cuda":
            kept.ready = torch.cuda.Event()
            kept.ready.record(torch.cuda.current_stream(states.device))
        kept.memory = memory
        self.memory_bytes += size

    def _empty(self, states: Tensor) -> Tensor:
        if self._pin:
            try:
                return torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
            except RuntimeError as error:
                self._pin = False
                warnings.warn(f"PrefixCache: no more pinned memory ({error}); copies to the GPU wait", stacklevel=2)
        return torch.empty(states.shape, dtype=states.dtype, device=self.device)

    def _add(self, kept: Kept) -> None:
        self.batches[kept.digest] = kept
        for number, row in enumerate(kept.rows or ()):
            self._examples.setdefault(row.digest, (kept, number))

    def _forget(self, kept: Kept) -> None:
        del self.batches[kept.digest]
        for row in kept.rows or ():
            if self._examples.get(row.digest, (None, 0))[0] is kept:
                del self._examples[row.digest]
