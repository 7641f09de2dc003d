"""What every analysis takes: prompts (padded or not, with roles or not) and heads, checked and freed of padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyarith.engine.batch import left_align, name_prompts, read_ids, read_mask
from pyarith.errors import InputError, InputTypeError, check
from pyarith.models.sites import ModelSites, length_limits
from pyarith.prompts import ROLES, PromptPairs
from pyarith.types import Head

Array = NDArray[Any]

TOKENS = 2048  # tokens per forward pass where the caller does not say


@dataclass(frozen=True)
class Prompts:
    """Prompts on the host, left-aligned.

    Attributes:
        ids: int64 [batch, pos], zero after END.
        lengths: int64 [batch]; END is ``lengths - 1``.
        starts: int64 [batch], the column of the caller's ids in which each prompt begins.
        width: number of columns of the caller's ids.
        answers: int64 [batch], or None where none were given.
        roles: int64 [batch, pos], index into ``role_names``, -1 after END; or None.
        role_names: names of the role codes.
    """

    ids: Tensor
    lengths: Tensor
    starts: Tensor
    width: int
    answers: Tensor | None
    roles: Tensor | None
    role_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def blocks(self, tokens: int) -> Iterator[Tensor]:
        """Indices of prompts of equal length (so a block needs no padding), about ``tokens`` tokens at a time."""
        for length in self.lengths.unique().tolist():
            rows = (self.lengths == length).nonzero().flatten()
            yield from rows.split(max(1, tokens // length))

    def need_answers(self) -> Tensor:
        if self.answers is None:
            raise InputError(
                "answers: expected int64 [batch], got None; pass answers=, or PromptPairs, which hold them"
            )
        return self.answers

    def need_roles(self) -> Tensor:
        if self.roles is None:
            raise InputError(
                "roles: expected the role of every token, got none; make the prompts with pa.tasks, or pass roles= to "
                "PromptPairs.from_text"
            )
        return self.roles


def read_prompts(
    sites: ModelSites,
    prompts: Any,
    attention_mask: Any = None,
    answers: Any = None,
    roles: Any = None,
    role_names: tuple[str, ...] = ROLES,
) -> Prompts:
    """Check the prompts of an analysis and strip their padding.

    Args:
        sites: the model.
        prompts: ``PromptPairs`` (their clean prompts), or int64 [batch, pos].
        attention_mask: [batch, pos] of 0 and 1, padding at either side; None = no padding.
        answers: int64 [batch].
        roles: integers [batch, pos], index into ``role_names``, anything on padding.
    Raises:
        InputError, InputTypeError: the message names the argument, what was expected, what came, and the prompts.
    """
    if isinstance(prompts, PromptPairs):
        beside = {"attention_mask": attention_mask, "answers": answers, "roles": roles}
        given = [name for name, value in beside.items() if value is not None]
        check(not given, f"{', '.join(given)}: expected None beside PromptPairs, which hold their own")
        check(len(prompts) > 0, "prompts: expected at least one, got none")
        attention_mask, answers, roles = prompts.attention_mask, prompts.answers, prompts.roles
        prompts, role_names = prompts.clean, prompts.role_names
    ids = read_ids(prompts, "prompts", 2, sites.d_vocab)
    mask = read_mask(attention_mask, "attention_mask", ids)
    aligned, lengths = left_align(ids, mask, "attention_mask")
    for what, limit in length_limits(sites):
        long = lengths > limit
        check(
            not bool(long.any()),
            f"prompts: expected at most {limit} tokens with {what}; prompts {name_prompts(long)} have more",
        )
    if answers is not None:
        answers = read_ids(answers, "answers", 1, sites.d_vocab)
        check(len(answers) == len(ids), f"answers: expected batch {len(ids)} like prompts, got {len(answers)}")
    codes = None if roles is None else _roles(roles, role_names, mask, aligned, lengths)
    return Prompts(aligned, lengths, mask.int().argmax(1), ids.shape[1], answers, codes, tuple(role_names))


def _roles(roles: Any, names: tuple[str, ...], mask: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    codes = torch.as_tensor(roles)
    check(codes.shape == mask.shape, f"roles: expected shape {list(mask.shape)} like prompts, got {list(codes.shape)}")
    whole = not (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool)
    check(whole, f"roles: expected integer codes of role_names, got dtype {codes.dtype}")
    codes = codes.cpu().long()
    outside = (((codes < 0) | (codes >= len(names))) & mask).any(1)
    check(
        not bool(outside.any()),
        f"roles: expected codes of {names}, 0 to {len(names) - 1}, on real tokens; prompts {name_prompts(outside)} "
        "have others",
    )
    out = torch.full_like(ids, -1)
    out[torch.arange(ids.shape[1]) < lengths[:, None]] = codes[mask]  # both row by row, in the order of tokens
    return out


def read_heads(sites: ModelSites, heads: Any) -> tuple[Head, ...]:
    """Check heads; all bad ones are named in one error.

    Raises:
        InputTypeError: not a sequence of (layer, head) pairs.
        InputError: none is given, one does not exist or comes twice.
    """
    pairs: list[Head] = []
    iterable = isinstance(heads, Iterable) and not isinstance(heads, str | bytes)
    for item in heads if iterable else [heads]:
        whole = isinstance(item, tuple | list) and len(item) == 2
        if not iterable or not whole or not all(isinstance(n, int | np.integer) and n is not True for n in item):
            raise InputTypeError(f"heads: expected (layer, head) pairs of whole numbers, got {item!r} in {heads!r}")
        pairs.append(Head(int(item[0]), int(item[1])))
    check(len(pairs) > 0, "heads: expected at least one (layer, head), got none")
    missing = [head for head in pairs if not (0 <= head.layer < sites.n_layers and 0 <= head.head < sites.n_heads)]
    check(
        not missing,
        f"heads: expected layer 0 to {sites.n_layers - 1} and head 0 to {sites.n_heads - 1}, got "
        f"{', '.join(map(str, missing))}, which the model does not have",
    )
    twice = [head for head, times in Counter(pairs).items() if times > 1]
    check(not twice, f"heads: expected each head once, got {', '.join(map(str, twice))} more than once")
    return tuple(pairs)


def read_tokens(tokens: Any) -> int:
    """Check the number of tokens of a forward pass."""
    whole = isinstance(tokens, int | np.integer) and not isinstance(tokens, bool) and tokens > 0
    check(bool(whole), f"tokens_per_pass: expected a positive whole number, got {tokens!r}")
    return int(tokens)
