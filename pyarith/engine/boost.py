"""Training-free reallocation of attention: chosen heads look more at chosen tokens.

It works through transformers' AttentionInterface. The model's own kernel runs first; then, for the chosen heads and
each prompt's last query only, the output is mixed with what the source tokens alone would give.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyarith.engine.ablation import check_targets
from pyarith.engine.batch import name_prompts
from pyarith.engine.calls import Call, CallWatcher, refuse_compiled
from pyarith.engine.guard import Hooks
from pyarith.errors import InputTypeError, UnsupportedModelError, check
from pyarith.models.sites import ModelSites, refuse_own_attention, resolve
from pyarith.types import Head

_PREFIX = "pyarith_boost_"  # in front of the name of the kernel that runs underneath
_KERNELS = ("eager", "sdpa")
_active: weakref.WeakKeyDictionary[nn.Module, list[_Boost]] = weakref.WeakKeyDictionary()  # outermost first


def boost(model: Any, heads: Iterable[tuple[int, int]], source: Any, alpha: float) -> AbstractContextManager[None]:
    """Move attention of chosen heads towards chosen tokens, as long as a ``with`` block lasts.

        p'[k] = (1 - alpha) * p[k] + alpha * p[k] * source[k] / sum_j p[j] * source[j]
        z'    = p' @ v

    for the attention p of a chosen head at the **last query of each prompt only**: END in a forward pass (the last
    real token where prompts are padded on the right), the newest token in each step of ``generate``. All other
    queries keep theirs. Where a head gives the source tokens no attention at all (the sum is 0), p stays as it is.
    Rows of p' sum to 1; with alpha = 0 the run is bit-identical to the plain run with the same attention kernel.

    In ``generate`` with a key/value cache every new token is boosted while it is the newest; without a cache the older
    ones are computed anew without it, so that the two differ.

    Contexts nest: an inner one mixes what the outer one left. ``output_attentions`` shows p' (eager kernel only).
    Gradients flow through p'; the attention of the last query is computed a second time where the kernel (sdpa) does
    not give it, for one query per prompt.

    Args:
        model: a supported Hugging Face causal language model with eager or sdpa attention. While the block lasts its
            ``config._attn_implementation`` has another name, and the model takes the batch of ``source`` only.
        heads: ``(layer, head)`` tuples.
        source: bool [batch, pos] in the columns of ``input_ids`` (padding included), such as
            ``pairs.roles == role``; or one list of positions per prompt, counted from its first real token. At least
            one token per prompt. Tokens made later by ``generate`` are no sources.
        alpha: in [0, 1]; 1 leaves the sources only.

    Raises:
        InputError: heads that do not exist or stand twice (all named at once), alpha outside [0, 1], a prompt without
            source; later, out of the model's forward: another batch, a source on padding or beyond the prompt.
        InputTypeError: sources or heads of another kind.
        UnsupportedModelError: a model that is not supported or was compiled; another attention kernel (flash, flex),
            GPT-2's reorder_and_upcast_attn, active attention dropout, a static cache, an attention module that does
            not go through the AttentionInterface.

    Warns:
        UserWarning: the model never ran inside the block.

    References: after Extending Token Computation, arXiv:2403.14932; the mixing rule is the one above.

    Examples:
        >>> import pyarith as pa, torch
        >>> model, tokenizer = pa.load_demo()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> with pa.boost(model, [(0, 1)], source=[[0, 1]], alpha=0.5):
        ...     logits = model(ids).logits
    """
    sites = resolve(model)
    refuse_own_attention(sites, "boost", "expected another family")
    chosen, _ = check_targets(sites, heads)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise InputTypeError(f"alpha: expected a number in [0, 1], got {alpha!r}")
    check(math.isfinite(alpha) and 0 <= alpha <= 1, f"alpha: expected a number in [0, 1], got {alpha}")
    kernel = sites.attention.removeprefix(_PREFIX)
    check(
        kernel in _KERNELS,
        f"boost: attention kernel {sites.attention!r} gives no attention to change; expected one of {_KERNELS} "
        "(load the model with attn_implementation='eager' or 'sdpa')",
        UnsupportedModelError,
    )
    check(
        not getattr(sites.config, "reorder_and_upcast_attn", False),
        f"boost: family {sites.spec.name!r} with config.reorder_and_upcast_attn computes attention outside the "
        "AttentionInterface",
        UnsupportedModelError,
    )
    refuse_compiled(sites, "boost")
    return _attached(sites, _Boost(sites, chosen, _Source(source), float(alpha)), kernel)


class _Source:
    """Source tokens of each prompt, as columns of the input or as positions from the first real token."""

    def __init__(self, source: Any) -> None:
        self.columns: Tensor | None = None
        self.positions: list[list[int]] = []
        if hasattr(source, "shape"):
            columns = torch.as_tensor(source).detach()
            check(
                columns.dtype == torch.bool and columns.ndim == 2,
                f"source: expected bool [batch, pos] or a list of positions per prompt, got {columns.dtype} "
                f"{list(columns.shape)}",
            )
            self.columns = columns
            empty = ~columns.any(1)
        else:
            self.positions = [_as_positions(row, i) for i, row in enumerate(_rows(source))]
            empty = torch.tensor([not row for row in self.positions])
        check(len(empty) > 0, "source: expected at least one prompt, got none")
        check(
            not bool(empty.any()),
            f"source: expected at least one token per prompt; prompts {name_prompts(empty)} have none",
        )
        self.batch = len(empty)

    def at(self, call: Call) -> Tensor:
        """bool [batch, total]: the columns of a call's cached and new tokens that are sources."""
        call.refuse_own_mask()
        check(
            call.batch == self.batch,
            f"source: names tokens of {self.batch} prompts, one row each; got a batch of {call.batch} (beams and "
            "num_return_sequences multiply rows)",
        )
        real = torch.ones(call.batch, call.total, dtype=torch.bool) if call.real is None else call.real.cpu()
        found = torch.zeros(call.batch, call.total, dtype=torch.bool)
        if self.columns is not None:
            width = self.columns.shape[1]
            check(width <= call.total, f"source: expected at most {call.total} columns like input_ids, got {width}")
            found[:, :width] = self.columns.cpu()
        else:
            counted = (real.long().cumsum(1) - 1).masked_fill(~real, -1)
            for i, row in enumerate(self.positions):
                n = int(real[i].sum())
                beyond = [p for p in row if p >= n]
                check(not beyond, f"source: prompt {i} has {n} tokens, got positions {beyond}")
                found[i] = torch.isin(counted[i], torch.tensor(row))
        on_padding = (found & ~real).any(1)
        check(not bool(on_padding.any()), f"source: prompts {name_prompts(on_padding)} have sources on padding")
        return found.to(call.device)


def _rows(source: Any) -> Sequence[Any]:
    if isinstance(source, str) or not isinstance(source, Sequence):
        raise InputTypeError(
            f"source: expected bool [batch, pos] or a list of positions per prompt, got {type(source).__name__}"
        )
    return source


def _as_positions(row: Any, prompt: int) -> list[int]:
    fits = isinstance(row, Iterable) and not isinstance(row, str)
    positions = list(row) if fits else []
    if not fits or any(isinstance(p, bool) or not hasattr(p, "__index__") for p in positions):
        raise InputTypeError(f"source: prompt {prompt}: expected a list of positions (integers), got {row!r}")
    positions = [int(p) for p in positions]
    check(
        all(p >= 0 for p in positions),
        f"source: prompt {prompt}: expected positions from 0 on, counted from the first real token, got {positions}",
    )
    return positions


class _Boost:
    """One context: its heads by attention module, and what the present call means for it."""

    def __init__(self, sites: ModelSites, heads: tuple[Head, ...], source: _Source, alpha: float) -> None:
        path = sites.spec.o_proj.rpartition(".")[0]
        layers = sorted({h.layer for h in heads})
        self.modules = {layer: sites.blocks[layer].block.get_submodule(path) for layer in layers}
        self.heads = {
            self.modules[layer]: torch.tensor([h.head for h in heads if h.layer == layer], device=sites.device)
            for layer in layers
        }
        for module in self.heads:
            _eager(module)  # refused here rather than in a forward pass
        self.alpha = alpha
        self.n_heads = sites.n_heads
        self._source = source
        self.watcher = CallWatcher(sites, "boost", self._begin)
        self._columns: Tensor | None = None
        self._missing: set[nn.Module] = set()

    def _begin(self, call: Call) -> None:
        check(
            not getattr(call.cache, "is_compileable", False),
            "boost: static caches keep keys in another order; use the default (dynamic) cache",
            UnsupportedModelError,
        )
        self._columns = self._source.at(call)
        self._missing = set(self.heads)

    def end(self) -> None:
        """After a call: every chosen layer must have come by."""
        layers = [layer for layer, module in self.modules.items() if module in self._missing]
        check(
            not layers,
            f"boost: attention of layers {layers} did not go through transformers' AttentionInterface, so nothing was "
            "changed (an overridden forward, or a config of its own?)",
            UnsupportedModelError,
        )

    def seen(self, module: nn.Module) -> None:
        self._missing.discard(module)

    def sources(self, n_keys: int) -> Tensor:
        """bool [batch, 1, n_keys]; windowed caches have dropped the oldest keys."""
        assert self._columns is not None
        return self._columns[:, None, self._columns.shape[1] - n_keys :]

    def mix(self, module: nn.Module, p: Tensor, out: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """p [batch, head, key] and out [batch, head, d_head] of the last query, changed for the chosen heads."""
        heads = self.heads[module]
        own = p[:, heads]
        restricted = own * self.sources(p.shape[-1])
        mass = restricted.sum(-1, keepdim=True)
        any_mass = mass > 0
        restricted = restricted / torch.where(any_mass, mass, 1.0)
        groups = self.n_heads // value.shape[1]
        v = value[:, heads // groups].to(p.dtype)  # [batch, chosen, key, d_head]
        there = (restricted[:, :, None] @ v)[:, :, 0].to(p.dtype)  # autocast may have made it narrower
        mixed = torch.where(any_mass, torch.lerp(out[:, heads], there, self.alpha), out[:, heads])
        new_p = torch.where(any_mass, torch.lerp(own, restricted, self.alpha), own)
        return p.index_copy(1, heads, new_p), out.index_copy(1, heads, mixed)


@contextmanager
def _attached(sites: ModelSites, this: _Boost, kernel: str) -> Iterator[None]:
    _register()
    config, before = sites.config, sites.attention
    with Hooks() as hooks:
        this.watcher.attach(hooks)
        hooks.after(sites.decoder, lambda _: this.end())
        try:
            for module in this.heads:
                _active.setdefault(module, []).append(this)
            config._attn_implementation = _PREFIX + kernel
            yield
        finally:
            config._attn_implementation = before
            for module in this.heads:
                _active[module].remove(this)
                if not _active[module]:
                    del _active[module]
    this.watcher.warn_if_unused()


def _register() -> None:
    """Make the attention functions known to transformers, each with the masks of the kernel underneath."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for kernel in _KERNELS:
        AttentionInterface.register(_PREFIX + kernel, partial(_attention, kernel))
        AttentionMaskInterface.register(_PREFIX + kernel, ALL_MASK_ATTENTION_FUNCTIONS[kernel])


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The plain attention of a family, from the file that defines the attention module."""
    home = sys.modules[type(module).__module__]
    function: Callable[..., tuple[Tensor, Tensor]] | None = getattr(home, "eager_attention_forward", None)
    if function is None or not hasattr(home, "ALL_ATTENTION_FUNCTIONS"):
        raise UnsupportedModelError(
            f"boost: {type(module).__name__} of {home.__name__} does not go through transformers' AttentionInterface"
        )
    return function


def _attention(
    kernel: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The kernel's own result, changed at each prompt's last query for the boosts of ``module``.

    query [batch, head, pos, d_head], key and value [batch, kv head, key, d_head] -> [batch, pos, head, d_head].
    """
    if kernel == "eager":
        run: Callable[..., tuple[Tensor, Tensor | None]] = _eager(module)
    else:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        run = ALL_ATTENTION_FUNCTIONS[kernel]
    out, weights = run(module, query, key, value, attention_mask, **kwargs)
    boosts = _active.get(module, [])
    if not boosts:
        return out, weights
    if kwargs.get("dropout"):
        raise UnsupportedModelError("boost: attention dropout is active; call model.eval() first")
    for each in boosts:
        each.seen(module)
    if all(each.alpha == 0 for each in boosts):
        return out, weights
    ends = boosts[0].watcher.call.ends()
    row = torch.arange(len(ends), device=ends.device)
    if weights is None:
        mask = _mask_at(attention_mask, ends, query.dtype)
        _, last = _eager(module)(module, query[row, :, ends][:, :, None], key, value, mask, **kwargs)
        p = last[:, :, 0]
    else:
        p = weights[row, :, ends]
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    p, z = p.to(wide), out[row, ends].to(wide)
    for each in boosts:
        p, z = each.mix(module, p, z, value)
    out = out.index_put((row, ends), z.to(out.dtype))
    if weights is not None:
        weights = weights.transpose(1, 2).index_put((row, ends), p.to(weights.dtype)).transpose(1, 2)
    return out, weights


def _mask_at(mask: Tensor | None, ends: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The additive mask [batch, 1, 1, key] of each prompt's last query.

    A kernel gets no mask where nothing is padded: the last query is the newest token then, and sees all keys.
    """
    if mask is None:
        return None
    row = torch.arange(len(ends), device=mask.device)
    rows = mask.expand(len(ends), -1, -1, -1)[row, :, ends][:, :, None]
    if rows.dtype != torch.bool:
        return rows
    return torch.zeros(rows.shape, dtype=dtype, device=mask.device).masked_fill_(~rows, torch.finfo(dtype).min)
