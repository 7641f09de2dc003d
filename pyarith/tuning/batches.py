"""Which examples go into which optimizer step, and as which tensors: padded, or several in one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyarith.engine.guard import untouched
from pyarith.errors import UnsupportedModelError, check
from pyarith.tuning.data import Examples

IGNORED = -100  # targets that do not count, as in transformers
_GROUPS = 2  # streams of the order of groups, behind those of task and replay
# a packed example's logits may differ from those it has alone by this much of the largest
_ALIKE = {torch.float64: 1e-4, torch.float32: 1e-3}
_ALIKE_16_BIT = 0.1


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once.

    Attributes:
        input_ids, position_ids: int64 [row, pos], padded on the right.
        attention_mask: int64 [row, pos], 0 on padding; None where rows hold several examples, which are told apart by
            their positions starting at 0 again.
        labels: int64 [row, pos], as in transformers: the token at its own place, ``IGNORED`` where it does not count.
        members: indices of the examples in each row.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    members: tuple[tuple[int, ...], ...]

    def to(self, device: torch.device | str) -> MicroBatch:
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return MicroBatch(**moved)

    def inputs(self) -> dict[str, Any]:
        """Arguments for the model or its decoder, beside ``use_cache=False``: with a key/value cache transformers does
        not tell packed examples apart."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }


@lru_cache(maxsize=4)
def order(n: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """int64 [n], a permutation that depends on its arguments alone: every arm of a comparison sees the same one."""
    found = np.random.default_rng([seed, epoch, stream]).permutation(n)
    found.setflags(write=False)
    return found


@dataclass(frozen=True)
class Batches:
    """Optimizer steps over examples, epoch after epoch; any step can be made without those before it.

    Step s of an epoch takes the examples order[s * batch_size : (s + 1) * batch_size] of the epoch's order; the last
    such step may have fewer. Without ``regroup`` the groups are those of the first order in every epoch, and come in an
    order of their own. Within a step examples of like length go together, which changes no sum but that of rounding.

    Attributes:
        examples: what is trained on.
        batch_size: examples of a step.
        rows: most rows that go through the model at once.
        seed: of the order.
        stream: another order of the same seed, for data beside the first.
        packed: tokens of a row that holds several examples; None = one example a row.
        regroup: other groups in every epoch.
    """

    examples: Examples
    batch_size: int
    rows: int
    seed: int = 0
    stream: int = 0
    packed: int | None = None
    regroup: bool = True

    def __post_init__(self) -> None:
        longest = int(self.examples.lengths.max())
        fits = self.packed is None or self.packed >= longest
        check(fits, f"packed: expected at least {longest} tokens, which the longest example takes, got {self.packed}")

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def chosen(self, step: int) -> np.ndarray:
        """int64 [example], the examples of optimizer step ``step``, counted from 0 over all epochs."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if not self.regroup:
            at = int(order(self.steps_per_epoch, self.seed, epoch, self.stream + _GROUPS)[at])
            epoch = 0
        every = order(len(self.examples), self.seed, epoch, self.stream)
        return every[at * self.batch_size : (at + 1) * self.batch_size]

    def n_targets(self, step: int) -> int:
        """Tokens that count in the loss of a step."""
        return int(self.examples.targets[self.chosen(step)].sum())

    def at(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step."""
        chosen = self.chosen(step)
        longest_first = chosen[np.argsort(-self.examples.lengths[chosen], kind="stable")].tolist()
        rows = [(one,) for one in longest_first] if self.packed is None else self._bins(longest_first, self.packed)
        return [
            micro_batch(self.examples, rows[start : start + self.rows], self.packed is not None)
            for start in range(0, len(rows), self.rows)
        ]

    def _bins(self, longest_first: list[int], size: int) -> list[tuple[int, ...]]:
        """Each example into the first row that has room for it."""
        bins: list[list[int]] = []
        room: list[int] = []
        for one in longest_first:
            length = len(self.examples.ids[one])
            place = next((i for i, free in enumerate(room) if free >= length), len(bins))
            if place == len(bins):
                bins.append([])
                room.append(size)
            bins[place].append(one)
            room[place] -= length
        return [tuple(one) for one in bins]


def micro_batch(examples: Examples, rows: Sequence[tuple[int, ...]], packed: bool = False) -> MicroBatch:
    """Tensors of rows of examples; with ``packed`` a row may hold several."""
    lengths = [sum(len(examples.ids[one]) for one in row) for row in rows]
    shape = (len(rows), max(lengths))
    ids, positions, real = (np.zeros(shape, np.int64) for _ in range(3))
    labels = np.full(shape, IGNORED, np.int64)
    for number, row in enumerate(rows):
        at = 0
        for one in row:
            own = examples.ids[one]
            place = (number, slice(at, at + len(own)))
            ids[place], positions[place], real[place] = own, np.arange(len(own)), 1
            labels[place] = np.where(examples.trained[one], own, IGNORED)
            at += len(own)
        # padding: a sequence of its own in a packed row; else the position that a cumulative sum of the mask gives
        positions[number, at:] = np.arange(shape[1] - at) if packed else at - 1
    input_ids, position_ids, label_ids, mask = map(torch.from_numpy, (ids, positions, labels, real))
    return MicroBatch(input_ids, position_ids, None if packed else mask, label_ids, tuple(map(tuple, rows)))


def check_isolated(model: Any, forward: Callable[..., Any], examples: Examples, rows: int) -> None:
    """Refuse packing where the examples of a row see each other.

    Two packed rows (one where ``rows`` is 1) of two examples go through the model. Changing the tokens of the first
    example must leave the logits of the second as they are, bit by bit, and they must be those it has alone, up to
    rounding: then neither attention nor positions reach across.

    Args:
        model: whose attention it is, for its device and the message.
        forward: what runs it.
        examples: of which the shortest are taken.
        rows: most rows at once in the run.
    Raises:
        UnsupportedModelError: they do not; the message names model and attention.
    """
    device = next(model.parameters()).device
    shortest = np.argsort(examples.lengths, kind="stable")[:4].tolist()
    pairs = [(shortest[0], shortest[-1]), (shortest[len(shortest) // 2], shortest[0])][: min(rows, 2)]
    packed = micro_batch(examples, pairs, packed=True).to(device)
    starts = [len(examples.ids[first]) for first, _ in pairs]

    def logits(micro: MicroBatch, **changed: Tensor) -> Tensor:
        with untouched(model):  # dropout would differ from call to call
            found: Tensor = forward(**{**micro.inputs(), **changed}, use_cache=False).logits
        return found

    before = logits(packed)
    changed = packed.input_ids.clone()
    for row, start in enumerate(starts):
        changed[row, :start] = (changed[row, :start] + 1) % before.shape[-1]
    after = logits(packed, input_ids=changed)
    for row, start in enumerate(starts):
        second = pairs[row][1]
        stop = start + len(examples.ids[second])
        own = logits(micro_batch(examples, [(second,)]).to(device))[0]
        kept, scale = before[row, start:stop], float(own.abs().max())
        leak, off = (float((kept - other).abs().max()) for other in (after[row, start:stop], own))
        if leak != 0 or not off <= _ALIKE.get(own.dtype, _ALIKE_16_BIT) * scale:
            kind = getattr(model.config, "_attn_implementation", "unknown")
            raise UnsupportedModelError(
                f"packing: {type(model).__name__} with attention {kind!r} does not keep the examples of a row apart: "
                f"the logits of one change by {leak:.2g} with the tokens of another, and differ by {off:.2g} from "
                f"those it has alone (largest {scale:.2g}); use packing=False, micro_batch_size=1, or load the model "
                "with attn_implementation='sdpa' or 'eager'"
            )
