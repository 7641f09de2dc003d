"""Checked prompts, freed of their padding.

Clean and corrupted prompts of one pair have equal length; everything behind this module sees token
sequences that start at position 0 and end at END, so the padding side never matters again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyarith.errors import InputError, InputTypeError, check
from pyarith.models.sites import ModelSites, length_limits

_SHOWN = 8  # prompts named in a message before "and n more"


@dataclass(frozen=True)
class Batch:
    """Prompts on the host, left-aligned.

    Attributes:
        clean, corrupted: int64 [batch, pos], zero after END.
        lengths: int64 [batch], tokens of a prompt (END is ``lengths - 1``).
        shared: int64 [batch], tokens at the start that clean and corrupted have in common.
        targets: int64 [batch, 1 + n_foils], the answer first.
    """

    clean: Tensor
    corrupted: Tensor
    lengths: Tensor
    shared: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def identity(self) -> list[Tensor]:
        """What tells it from other batches."""
        return [self.clean, self.corrupted, self.lengths, self.targets]

    @property
    def common_prefix(self) -> int:
        """Tokens at the start that all prompts, clean and corrupted, have in common."""
        limit = int(self.shared.min())
        same = (self.clean[:, :limit] == self.clean[:1, :limit]).all(0)
        return int(same.int().cumprod(0).sum())


def name_prompts(bad: Tensor) -> str:
    """Indices where ``bad`` is True, for a message."""
    indices = bad.nonzero().flatten().tolist()
    more = f" and {len(indices) - _SHOWN} more" if len(indices) > _SHOWN else ""
    return ", ".join(map(str, indices[:_SHOWN])) + more


def read_ids(value: Any, name: str, dims: int, d_vocab: int) -> Tensor:
    """Token ids as int64 with ``dims`` axes, on the host.

    Raises:
        InputTypeError: no tensor can be made of them.
        InputError: not integers, of another shape, empty, or outside the vocabulary (the prompts are named).
    """
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(
            f"{name}: expected an int64 tensor of token ids, got {type(value).__name__} ({error})"
        ) from error
    check(
        not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool),
        f"{name}: expected integer token ids, got dtype {tensor.dtype}",
    )
    axes = "[batch]" if dims == 1 else "[batch, pos]" if name != "foils" else "[batch, k]"
    more = "; answers of several tokens do not exist yet" if name == "answers" and tensor.dim() == 2 else ""
    check(tensor.dim() == dims, f"{name}: expected shape {axes}, got {list(tensor.shape)}{more}")
    check(tensor.numel() > 0, f"{name}: expected at least one prompt and one token, got shape {list(tensor.shape)}")
    tensor = tensor.detach().to(device="cpu", dtype=torch.int64)
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high >= d_vocab:
        outside = ((tensor < 0) | (tensor >= d_vocab)).reshape(len(tensor), -1).any(1)
        got = low if low < 0 else high
        raise InputError(f"{name}: expected token ids in [0, {d_vocab}), got {got} (prompts {name_prompts(outside)})")
    return tensor


def read_mask(value: Any, name: str, ids: Tensor) -> Tensor:
    """An attention mask as bool in the shape of its prompts, on the host; None = all tokens are real.

    Raises:
        InputError: another shape, or values other than 0 and 1.
    """
    if value is None:
        return torch.ones_like(ids, dtype=torch.bool)
    mask = torch.as_tensor(value).detach().cpu()
    check(mask.shape == ids.shape, f"{name}: expected shape {list(ids.shape)} like its prompts, got {list(mask.shape)}")
    check(bool(((mask == 0) | (mask == 1)).all()), f"{name}: expected only 0 and 1, got other values")
    return mask.bool()


def left_align(ids: Tensor, mask: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(ids [batch, pos] that start at position 0, zero after END; lengths int64 [batch]).

    Raises:
        InputError: a prompt without real tokens, or with padding between them (all are named).
    """
    lengths = mask.sum(1)
    empty = lengths == 0
    check(
        not bool(empty.any()),
        f"{name}: expected at least one real token per prompt; prompts {name_prompts(empty)} have none",
    )
    first = mask.int().argmax(1)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    holed = last - first + 1 != lengths
    check(
        not bool(holed.any()),
        f"{name}: expected padding at one side only; prompts {name_prompts(holed)} have a hole (a 0 between two 1s)",
    )
    offset = torch.arange(int(lengths.max()))
    index = (first[:, None] + offset).clamp_max(ids.shape[1] - 1)
    return torch.where(offset < lengths[:, None], ids.gather(1, index), 0), lengths


def make_batch(
    sites: ModelSites,
    clean: Any,
    corrupted: Any,
    answers: Any,
    attention_mask: Any = None,
    corrupted_attention_mask: Any = None,
    foils: Any = None,
) -> Batch:
    """Check the inputs of a run and strip their padding.

    Raises:
        InputError, InputTypeError: the message names the argument, what was expected, what came, and the prompts.
    """
    clean_ids = read_ids(clean, "clean", 2, sites.d_vocab)
    corrupted_ids = read_ids(corrupted, "corrupted", 2, sites.d_vocab)
    answer_ids = read_ids(answers, "answers", 1, sites.d_vocab)
    n = len(clean_ids)
    for name, tensor in (("corrupted", corrupted_ids), ("answers", answer_ids)):
        check(len(tensor) == n, f"{name}: expected batch {n} like clean, got {len(tensor)}")
    targets = answer_ids[:, None]
    if foils is not None:
        foil_ids = read_ids(foils, "foils", 2, sites.d_vocab)
        check(len(foil_ids) == n, f"foils: expected batch {n} like clean, got {len(foil_ids)}")
        targets = torch.cat([targets, foil_ids], 1)

    clean_ids, lengths = left_align(clean_ids, read_mask(attention_mask, "attention_mask", clean_ids), "attention_mask")
    corrupted_ids, corrupted_lengths = left_align(
        corrupted_ids,
        read_mask(corrupted_attention_mask, "corrupted_attention_mask", corrupted_ids),
        "corrupted_attention_mask",
    )
    unequal = lengths != corrupted_lengths
    if bool(unequal.any()):
        first = int(unequal.nonzero()[0])
        raise InputError(
            f"corrupted: expected as many tokens as clean in every pair; prompts {name_prompts(unequal)} differ "
            f"(prompt {first}: clean {int(lengths[first])}, corrupted {int(corrupted_lengths[first])})"
        )
    same = clean_ids == corrupted_ids
    equal = same.all(1)
    check(
        not bool(equal.any()),
        f"corrupted: expected a token that differs from clean in every pair; prompts {name_prompts(equal)} are equal",
    )
    for what, limit in length_limits(sites):
        long = lengths > limit
        check(
            not bool(long.any()),
            f"clean: expected at most {limit} tokens with {what}; prompts {name_prompts(long)} have more",
        )
    return Batch(clean_ids, corrupted_ids, lengths, same.int().cumprod(1).sum(1), targets)
