"""Reference sets of baselines: prompts without their padding, runs over them, and which prompt stands in for which."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyarith.engine.batch import left_align, name_prompts, read_ids, read_mask
from pyarith.engine.capture import run_decoder
from pyarith.engine.guard import Hooks, untouched
from pyarith.errors import check
from pyarith.models.sites import ModelSites, length_limits

_SAMPLES = 64  # values looked at per weight
# config entries that may differ for the same model
_NOT_THE_MODEL = ("architectures", "transformers_version", "dtype", "torch_dtype", "use_cache")


def fingerprint(sites: ModelSites) -> str:
    """``sha256:...`` of config, dtype and 64 values of each weight. Device and attention kernel do not count."""
    config = {k: v for k, v in sites.config.to_dict().items() if k[:1] != "_" and k not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps([str(sites.dtype), config], sort_keys=True, default=str).encode())
    samples = []
    for name, weight in sorted(sites.model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        flat = weight.detach().reshape(-1)
        samples.append(flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES])
    digest.update(torch.cat(samples).cpu().view(torch.uint8).numpy().tobytes())  # one transfer
    return f"sha256:{digest.hexdigest()}"


def run_aligned(
    sites: ModelSites, ids: Tensor, heads: Tensor, mlps: Tensor, put: Callable[[Tensor, int, Tensor], None]
) -> None:
    """One pass over left-aligned prompts; ``put(heads or mlps, layer, values [batch, pos, width])`` at every site.

    Padding lies behind the real tokens, where causal attention does not let it reach them: no mask is needed.
    """

    def hook(into: Tensor, layer: int) -> Callable[[Tensor], None]:
        return lambda x: put(into, layer, x)

    ids = ids.to(sites.device)
    positions = torch.arange(ids.shape[1], device=sites.device).expand_as(ids)
    with untouched(sites.model), Hooks() as hooks:
        for layer, block in enumerate(sites.blocks):
            hooks.before(block.o_proj, hook(heads, layer))
            hooks.after(block.mlp_write, hook(mlps, layer))
        run_decoder(sites, ids, positions, None, None)


def aligned_batches(sites: ModelSites, input_ids: Any, attention_mask: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids left-aligned, lengths) of one batch or of each batch of an iterable."""
    if attention_mask is not None or _is_batch(input_ids):
        yield one_batch(sites, input_ids, attention_mask, "input_ids", "attention_mask")
        return
    check(isinstance(input_ids, Iterable), f"input_ids: expected token ids or batches, got {type(input_ids).__name__}")
    for number, item in enumerate(input_ids):
        pair = (item, None) if _is_batch(item) else item
        check(
            isinstance(pair, tuple | list) and len(pair) == 2,
            f"input_ids: expected batch {number} to be a tensor or a pair (input_ids, attention_mask), "
            f"got {type(item).__name__}",
        )
        ids, mask = pair
        yield one_batch(sites, ids, mask, f"input_ids of batch {number}", f"attention_mask of batch {number}")


def _is_batch(value: Any) -> bool:
    """A tensor or array, or a list of lists of ids."""
    if hasattr(value, "shape"):
        return True
    rows = isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], list | tuple)
    return rows and len(value[0]) > 0 and isinstance(value[0][0], int)


def one_batch(sites: ModelSites, ids: Any, mask: Any, name: str, mask_name: str) -> tuple[Tensor, Tensor]:
    tokens = read_ids(ids, name, 2, sites.d_vocab)
    tokens, lengths = left_align(tokens, read_mask(mask, mask_name, tokens), mask_name)
    for what, limit in length_limits(sites):
        long = lengths > limit
        bad = f"prompts {name_prompts(long)} have more"
        check(not bool(long.any()), f"{name}: expected at most {limit} tokens with {what}; {bad}")
    return tokens, lengths


def derangement(ids: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [batch]: for each prompt another one of the same length and with other tokens, each used once.

    Prompts with equal tokens are put side by side in a random order; a cyclic shift by at least the size of the
    largest such group, and at most what is left of the circle, leaves none in its own group.
    """
    _, group = torch.unique(ids, dim=0, return_inverse=True)  # padding is 0 in all: lengths are looked at apart
    sources = torch.full((len(ids),), -1)
    for length in lengths.unique():
        members = (lengths == length).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        rank = torch.randperm(len(ids), generator=generator)[group[members]]
        members = members[rank.argsort(stable=True)]
        largest = int(group[members].bincount().max())
        if 2 * largest <= len(members):
            shift = int(torch.randint(largest, len(members) - largest + 1, (), generator=generator))
            sources[members] = members.roll(shift)
    _refuse_alone(sources < 0)
    return sources


def draw(ids: Tensor, lengths: Tensor, pool: Tensor, pool_lengths: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [batch]: for each prompt a random reference prompt of the same length and with other tokens."""
    sources = torch.full((len(ids),), -1)
    for i, length in enumerate(lengths.tolist()):
        fits = pool_lengths == length
        fits[fits.clone()] = (pool[fits, :length] != ids[i, :length]).any(1)
        candidates = fits.nonzero().flatten()
        if len(candidates):
            sources[i] = candidates[int(torch.randint(len(candidates), (), generator=generator))]
    _refuse_alone(sources < 0)
    return sources


def _refuse_alone(alone: Tensor) -> None:
    check(
        not bool(alone.any()),
        f"input_ids: prompts {name_prompts(alone)} have no other prompt of the same length and with other tokens to "
        "take values from (none onto itself, each used at most once); give more prompts or a reference set",
    )
