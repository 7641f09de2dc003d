"""Ablation of heads and MLPs inside the model's own forward pass and ``generate``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from pyarith.engine.baselines import Baseline, ZeroAblation, values_at
from pyarith.engine.calls import Call, CallWatcher, refuse_compiled
from pyarith.engine.guard import Hooks
from pyarith.errors import InputError, InputTypeError, check
from pyarith.models.sites import ModelSites, resolve
from pyarith.types import Head

_ZERO = ZeroAblation()
_SHOWN = 8  # targets named in a message before "and n more"


def ablated(
    model: Any,
    heads: Iterable[tuple[int, int]] = (),
    baseline: Baseline = _ZERO,
    *,
    mlps: Iterable[int] = (),
) -> AbstractContextManager[None]:
    """Replace what chosen heads and MLPs write, at every position, as long as a ``with`` block lasts.

        z[b, p, h] := baseline[b, p, h]  for the chosen heads, where z is the input of o_proj
        write[b, p] := baseline[b, p]    for the chosen MLPs, where write is what the MLP adds to the residual stream

    Everything downstream is recomputed (a total effect). The model runs as it is: any dtype, attention kernel,
    padding, key/value cache, ``generate`` and gradients (nothing flows into what was replaced); training flags and
    autograd mode are left alone. Where the MLP's output goes through a norm (Gemma-2), its write is what comes after;
    where a residual multiplier follows (Granite), what comes before.

    Contexts nest: all their replacements hold, and for a head or MLP named twice the inner one does.

    With a baseline per position or per prompt, the position of each token is counted from its prompt's first real
    token: by the attention mask [batch, pos], else by ``position_ids``, else all tokens are real.

    Args:
        model: a supported Hugging Face causal language model.
        heads: ``(layer, head)`` tuples.
        baseline: ``ZeroAblation()``, ``MeanAblation`` or ``ResampleAblation`` (the latter for the batch it was made
            with only, and not with beams, which multiply the rows).
        mlps: layers.

    Raises:
        InputError: nothing to ablate; a target that the model does not have or that is named twice (all are named in
            one message, and nothing is attached); a baseline of another model. Later, out of the model's forward:
            a position or a batch that the baseline has no values for.
        InputTypeError: heads that are no tuples of integers; a baseline that is none.
        UnsupportedModelError: a model that is not supported, was compiled, or (later) runs gradient checkpointing.

    Warns:
        UserWarning: the model never ran inside the block.

    References: Wang et al. 2022, arXiv:2211.00593, sec. 2 (knock-outs).

    Examples:
        >>> import pyarith as pa, torch
        >>> model, tokenizer = pa.load_demo()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> intact = model(ids).logits
        >>> with pa.ablated(model, heads=[(0, 1)]):
        ...     knocked_out = model(ids).logits
        >>> bool((knocked_out != intact).any()), bool((model(ids).logits == intact).all())
        (True, True)
    """
    sites = resolve(model)
    chosen, layers = check_targets(sites, heads, mlps)
    check(
        isinstance(baseline, Baseline),
        f"baseline: expected ZeroAblation(), a MeanAblation or a ResampleAblation, got {type(baseline).__name__}",
        InputTypeError,
    )
    baseline.check(sites)
    refuse_compiled(sites, "ablated")
    return _attached(sites, chosen, layers, baseline)


def check_targets(
    sites: ModelSites, heads: Iterable[tuple[int, int]], mlps: Iterable[int] = ()
) -> tuple[tuple[Head, ...], tuple[int, ...]]:
    """Heads and MLP layers of a model, checked.

    Raises:
        InputError, InputTypeError: nothing given, targets that do not exist or stand twice; all are named at once.
    """
    chosen = [_as_integers(item, 2) for item in _listed(heads, "heads")]
    layers = [_as_integers(item, 1) for item in _listed(mlps, "mlps")]
    no_heads = [item for item in chosen if not isinstance(item, tuple)]
    no_layers = [item for item in layers if not isinstance(item, tuple)]
    expected_head = "(layer, head) tuples of integers (Head.parse('9.6') reads text)"
    check(not no_heads, f"heads: expected {expected_head}, got {_named(no_heads)}", InputTypeError)
    check(not no_layers, f"mlps: expected layer numbers, got {_named(no_layers)}", InputTypeError)
    limits = (sites.n_layers, sites.n_heads)
    outside = [h for h in chosen if not all(0 <= i < n for i, n in zip(h, limits, strict=True))]
    outside_mlps = [m for m in layers if not 0 <= m[0] < sites.n_layers]
    twice = sorted({h for h in chosen if chosen.count(h) > 1})
    twice_mlps = sorted({m for m in layers if layers.count(m) > 1})
    problems = [
        (outside, f"heads: the model has layers 0 to {limits[0] - 1} with heads 0 to {limits[1] - 1} each, got"),
        (outside_mlps, f"mlps: the model has layers 0 to {limits[0] - 1}, got"),
        (twice, "heads: expected each head once, got twice"),
        (twice_mlps, "mlps: expected each layer once, got twice"),
    ]
    message = "; ".join(f"{text} {_named(['.'.join(map(str, t)) for t in items])}" for items, text in problems if items)
    check(not message, message)
    check(bool(chosen or layers), "heads, mlps: expected at least one head or MLP, got none")
    return tuple(Head(*h) for h in chosen), tuple(m[0] for m in layers)


def _listed(values: Any, name: str) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputTypeError(f"{name}: expected a list, got {values!r}")
    return list(values)


def _as_integers(item: Any, size: int) -> Any:
    """A tuple of ``size`` ints, or the item itself where it is no such thing."""
    parts = (item,) if size == 1 else item
    if isinstance(parts, str) or not isinstance(parts, Iterable):
        return item if not isinstance(item, tuple) else list(item)
    parts = list(parts)
    if len(parts) != size or any(isinstance(part, bool) for part in parts):
        return list(parts)
    try:
        return tuple(operator.index(part) for part in parts)
    except TypeError:
        return parts


def _named(items: list[Any]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(str(item) for item in items[:_SHOWN]) + more


class _Values:
    """A baseline's values for the tokens of the present call, read once per layer."""

    def __init__(self, sites: ModelSites, baseline: Baseline, watcher: CallWatcher) -> None:
        self._sites, self._baseline, self._watcher = sites, baseline, watcher
        self._by_place = baseline.lengths is not None

    def getter(self, values: Tensor | None, dims: int) -> Callable[[Tensor], Tensor]:
        """A function that gives what broadcasts against x [batch, pos, ...] in its dtype."""

        def get(x: Tensor) -> Tensor:
            if values is None:
                return x.new_zeros(())
            found = values_at(values, self._watcher.call.positions) if self._by_place else values
            return found.to(x.dtype)

        if values is not None:
            check(
                values.ndim == dims,
                f"baseline: {self._baseline.name} gave values of shape {list(values.shape)}, expected {dims} axes",
            )
        return get


@contextmanager
def _attached(sites: ModelSites, heads: tuple[Head, ...], mlps: tuple[int, ...], baseline: Baseline) -> Iterator[None]:
    def fits(call: Call) -> None:
        _check_call(baseline, call)

    watcher = CallWatcher(sites, "ablated", fits)
    values = _Values(sites, baseline, watcher)
    by_layer = {layer: [h.head for h in heads if h.layer == layer] for layer in sorted({h.layer for h in heads})}
    head_hooks = {
        layer: _replace_heads(sites, chosen, values.getter(baseline.head_values(sites, layer), 4))
        for layer, chosen in by_layer.items()
    }
    mlp_hooks = {layer: _replace_all(values.getter(baseline.mlp_values(sites, layer), 3)) for layer in mlps}
    with Hooks() as hooks:
        watcher.attach(hooks)
        for layer, replace in head_hooks.items():
            hooks.before(sites.blocks[layer].o_proj, replace)
        for layer, replace in mlp_hooks.items():
            hooks.after(sites.blocks[layer].mlp_write, replace)
        yield
    watcher.warn_if_unused()


def _check_call(baseline: Baseline, call: Call) -> None:
    """Raise InputError where the baseline has no values for a row or a position of the call."""
    lengths = baseline.lengths
    if lengths is None:
        return
    check(
        len(lengths) == 1 or call.batch == len(lengths),
        f"baseline: {baseline.name} holds values for {len(lengths)} prompts, one row each; got a batch of {call.batch} "
        "(beams and num_return_sequences multiply rows)",
    )
    positions = call.positions.cpu()
    beyond = (positions >= lengths[:, None]) | (positions < 0)
    if bool(beyond.any()):
        row, column = beyond.nonzero()[0].tolist()
        limit = int(lengths[row if len(lengths) > 1 else 0])
        raise InputError(
            f"baseline: {baseline.name} has values for positions 0 to {limit - 1}; prompt {row} has a token at "
            f"position {int(positions[row, column])}. Measure the baseline on longer inputs, or use MeanAblation with "
            "over='batch_pos'"
        )


def _replace_heads(sites: ModelSites, heads: list[int], get: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """z [batch, pos, n_heads * d_head] -> the same with the values of ``get`` in the chosen heads."""
    ablate = torch.zeros(sites.n_heads, 1, dtype=torch.bool, device=sites.device)
    ablate[heads] = True

    def replace(z: Tensor) -> Tensor:
        by_head = z.unflatten(-1, (sites.n_heads, sites.d_head))
        return torch.where(ablate, get(by_head), by_head).flatten(-2)

    return replace


def _replace_all(get: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """write [batch, pos, d_model] -> the values of ``get`` in its shape."""
    return lambda write: get(write).expand_as(write).clone()
