"""One clean and one corrupted run through the model's own modules, of which only END is kept.

The decoder is called, the LM head never, and the last MLP only for END. What is stored per prompt is a few
vectors per layer; nothing of shape [batch, pos, head, d_model] ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pyarith.engine.batch import Batch
from pyarith.engine.guard import Hooks, output_of
from pyarith.engine.packing import Packed, additive, causal, pack, pack_plain
from pyarith.engine.routing import experts_of, no_routes
from pyarith.models.sites import ModelSites

_MASKED_ATTENTION = ("eager", "sdpa")

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Captured:
    """What the replay needs of a block of prompts, at END, on the model's device, in row dtype.

    An *entry* j is a place where rows start: before MLP j, or j = n_layers just before the final norm.

    Attributes:
        base: [n_layers + 1, batch, d_model] clean residual stream at the entries (serial: after attention j;
            parallel: before block j).
        writes: [n_layers, batch, d_model] what attention j adds in the clean run (times the residual multiplier).
        dz: [n_layers, batch, n_heads * d_head] z of the corrupted run minus z of the clean run.
        dmlp: [n_layers, batch, d_model] MLP write of the corrupted run minus that of the clean run, or None.
        pre, raw: [n_layers, batch, d_model] block input and attention output before its norm and multiplier
            (families with a norm after attention), or None.
        clean_hidden, corrupted_hidden: [batch, d_model] decoder output at END, model dtype.
        routes: int64 [n_layers, batch, top_k] experts that the clean run chose at END (mixtures of experts), or None.
    """

    base: Tensor
    writes: Tensor
    dz: Tensor
    dmlp: Tensor | None
    pre: Tensor | None
    raw: Tensor | None
    clean_hidden: Tensor
    corrupted_hidden: Tensor
    routes: Tensor | None

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value


def takes_trees(sites: ModelSites) -> bool:
    """Whether the model's attention takes a mask of ours; flash and flex kernels make their own."""
    return sites.attention in _MASKED_ATTENTION


def allocate(sites: ModelSites, n: int, mlps: bool) -> Captured:
    def rows(layers: int, width: int) -> Tensor:
        return torch.empty(layers, n, width, dtype=sites.row_dtype, device=sites.device)

    layers, d = sites.n_layers, sites.d_model
    post = sites.blocks[0].attn_post_norm is not None
    hidden = [torch.empty(n, d, dtype=sites.dtype, device=sites.device) for _ in range(2)]
    return Captured(
        base=rows(layers + 1, d),
        writes=rows(layers, d),
        dz=rows(layers, sites.n_heads * sites.d_head),
        dmlp=rows(layers, d) if mlps else None,
        pre=rows(layers, d) if post else None,
        raw=rows(layers, d) if post else None,
        clean_hidden=hidden[0],
        corrupted_hidden=hidden[1],
        routes=no_routes(sites, n),
    )


def bytes_per_prompt(sites: ModelSites, mlps: bool) -> int:
    """Bytes that ``Captured`` holds for one prompt."""
    meta = torch.device("meta")
    fake = allocate(ModelSites(**{**vars(sites), "device": meta}), 1, mlps)
    return sum(tensor.nbytes for _, tensor in fake.named())


class LastMlp(Exception):
    """Raised where the last MLP would start: from there on only END is needed."""


def _stop(_: Tensor) -> None:
    raise LastMlp


class Prefix:
    """Keys and values of the tokens that all prompts share, computed once, one stored copy per layer."""

    def __init__(self, sites: ModelSites, ids: Tensor) -> None:
        from transformers import DynamicCache

        self.length = len(ids)
        # without a config every layer keeps all keys; sliding windows are in our masks
        self.cache = DynamicCache() if self.length else None
        if self.length:
            ids = ids.to(sites.device)[None]
            positions = torch.arange(self.length, device=sites.device)[None]
            masks = masks_for(sites, lambda window: causal(self.length, window, sites.device))
            with Hooks() as hooks, suppress(LastMlp):
                hooks.before(sites.blocks[-1].mlp, _stop)  # keys and values are all that is wanted
                run_decoder(sites, ids, positions, masks, self.cache)

    def forget(self, n: int, layer: int | None = None) -> None:
        """Drop the ``n`` newest tokens of the cache (of one layer), which belong to a block of prompts."""
        if self.cache is not None:
            part: Any = self.cache if layer is None else self.cache.layers[layer]
            part.crop(-n)


def masks_for(sites: ModelSites, allowed: Callable[[int | None], Tensor]) -> Any:
    """The attention masks in the form that the family's decoder takes."""
    by_window = {window: additive(allowed(window), sites.dtype) for window in set(sites.windows)}
    if not sites.spec.masks_by_layer_type:
        return by_window[sites.windows[0]]
    types = sites.config.layer_types
    return {kind: by_window[window] for kind, window in zip(types, sites.windows, strict=True)}


def run_decoder(sites: ModelSites, ids: Tensor, positions: Tensor, masks: Any, cache: Any) -> None:
    """Run the decoder for its cache and its hooks; flags of the config that collect outputs are overruled."""
    sites.decoder(
        input_ids=ids,
        attention_mask=masks,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=True,
    )


@contextmanager
def recording(
    sites: ModelSites, packed: Packed, into: Captured, at: slice, layers: Iterable[int]
) -> Iterator[dict[str, Tensor]]:
    """Hooks on ``layers`` that copy END of every pair into ``into[..., at, :]`` and stop the pass before its last MLP.

    Yields what finishes the last block: "mlp_input", "residual" and attention's "write", clean ends then corrupted.
    """
    ends = torch.cat([packed.clean_end, packed.corrupted_end])
    last: dict[str, Tensor] = {}

    def at_ends(x: Tensor, index: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])[index.to(x.device)].to(sites.device)

    def as_is(x: Tensor) -> Tensor:
        return x

    def keep(store: Tensor | None, layer: int, change: Change = as_is) -> Callable[[Tensor], None]:
        def call(x: Tensor) -> None:
            if store is not None:
                store[layer, at] = change(at_ends(x, packed.clean_end))

        return call

    def difference(store: Tensor, layer: int, change: Change = as_is) -> Callable[[Tensor], None]:
        def call(x: Tensor) -> None:
            _put_difference(store[layer, at], change(at_ends(x, ends)))

        return call

    def keep_both(name: str, change: Change = as_is) -> Callable[[Tensor], None]:
        def call(x: Tensor) -> None:
            last[name] = change(at_ends(x, ends))

        return call

    def keep_routes(layer: int) -> Callable[[Any], None]:
        def call(output: Any) -> None:
            assert into.routes is not None
            into.routes[layer, at] = experts_of(output)[packed.clean_end]

        return call

    with Hooks() as hooks:
        for layer in layers:
            block = sites.blocks[layer]
            if block.router is not None:
                hooks.see(block.router, keep_routes(layer))
            residual = block.block if sites.parallel else block.mlp_reads
            hooks.before(residual, keep(into.base, layer))
            hooks.before(block.o_proj, difference(into.dz, layer))
            hooks.after(block.attn_write, keep(into.writes, layer, sites.scaled))
            if into.raw is not None:
                hooks.before(block.block, keep(into.pre, layer))
                hooks.after(block.o_proj, keep(into.raw, layer))
            if layer == sites.n_layers - 1:
                hooks.before(residual, keep_both("residual"))
                hooks.after(block.attn_write, keep_both("write", sites.scaled))
                hooks.before(block.mlp, keep_both("mlp_input"))
                hooks.before(block.mlp, _stop)
            elif into.dmlp is not None:
                hooks.after(block.mlp_write, difference(into.dmlp, layer, sites.scaled))
        yield last


def _put_difference(target: Tensor, both: Tensor) -> None:
    """target = corrupted - clean, subtracted in row dtype."""
    clean, corrupted = both.chunk(2)
    target.copy_(corrupted).sub_(clean)


def packed_for(sites: ModelSites, batch: Batch, indices: Tensor, prefix: Prefix) -> Packed:
    """The layout of the pairs ``indices``, on the model's device."""
    packed = pack(batch, indices, prefix.length) if takes_trees(sites) else pack_plain(batch, indices)
    return packed.to(sites.device)


def capture(sites: ModelSites, batch: Batch, indices: Tensor, prefix: Prefix, into: Captured, at: slice) -> None:
    """Run the pairs ``indices`` (clean and corrupted at once) and store END at ``into[..., at, :]``."""
    packed = packed_for(sites, batch, indices, prefix)
    masks = masks_for(sites, packed.allowed) if packed.padding is None else packed.padding
    with recording(sites, packed, into, at, range(sites.n_layers)) as last, suppress(LastMlp):
        run_decoder(sites, packed.input_ids, packed.position_ids, masks, prefix.cache)
    prefix.forget(packed.input_ids.shape[1])
    finish(sites, last, into, at)


def finish(sites: ModelSites, last: dict[str, Tensor], into: Captured, at: slice) -> None:
    """The last MLP and the final norm, by the model's own modules, for END only (the self-check covers this)."""

    def keep_routes(output: Any) -> None:
        assert into.routes is not None
        into.routes[-1, at] = experts_of(output).chunk(2)[0]

    block = sites.blocks[-1]
    with Hooks() as hooks:
        if block.router is not None:
            hooks.see(block.router, keep_routes)
        write = output_of(block.mlp, last["mlp_input"][None])
    if block.mlp_post_norm is not None:
        write = block.mlp_post_norm(write)
    write = sites.scaled(write.to(sites.device))
    if into.dmlp is not None:
        _put_difference(into.dmlp[-1, at], write[0])
    if sites.parallel:
        write = write + last["write"]
    residual = write + last["residual"]
    into.base[-1, at] = residual[0].chunk(2)[0]
    into.clean_hidden[at], into.corrupted_hidden[at] = sites.final_norm(residual)[0].chunk(2)
