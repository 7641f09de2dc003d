"""What a call of a model's decoder says about its tokens: how many, after how many, which of them are padding.

Interventions that live through ``generate`` need to know where each new token stands in its prompt.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyarith.engine.guard import Hooks
from pyarith.errors import InputError, UnsupportedModelError, check
from pyarith.models.sites import ModelSites


@dataclass(frozen=True)
class Call:
    """One call of the decoder.

    Attributes:
        batch, length: rows and new tokens.
        past: tokens in the key/value cache before the call.
        real: bool [batch, past + length], False on padding; None where the call came without a 2-D attention mask.
        position_ids: int64 [batch or 1, length] as given, or None.
        own_mask: the call brought attention masks of another form.
        cache: the key/value cache, or None.
    """

    batch: int
    length: int
    past: int
    real: Tensor | None
    position_ids: Tensor | None
    own_mask: bool
    cache: Any
    device: torch.device

    @property
    def total(self) -> int:
        return self.past + self.length

    def counted(self) -> Tensor:
        """int64 [batch, past + length], positions counted from each row's first real token (0 on padding before it).

        Raises:
            InputError: the call brought attention masks of its own, from which padding cannot be told.
        """
        self.refuse_own_mask()
        if self.real is None:
            return torch.arange(self.total, device=self.device).expand(self.batch, -1)
        return (self.real.long().cumsum(1) - 1).clamp_min(0)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [batch, length], positions of the new tokens, counted from each row's first real token.

        From the attention mask; without one from ``position_ids``; without both all tokens are real.
        """
        if self.real is None and self.position_ids is not None:
            return self.position_ids.expand(self.batch, -1)
        return self.counted()[:, self.past :]

    def ends(self) -> Tensor:
        """int64 [batch], index among the new tokens of each row's last real one (the last where all are padding)."""
        if self.real is None:
            self.refuse_own_mask()
            return torch.full((self.batch,), self.length - 1, device=self.device)
        new = self.real[:, self.past :]
        return self.length - 1 - new.flip(1).int().argmax(1)

    def refuse_own_mask(self) -> None:
        check(
            not self.own_mask,
            "attention_mask: expected [batch, pos] with 0 on padding, or None; from a mask of another form the "
            "position of a token cannot be told",
        )


class CallWatcher:
    """Keeps the present ``Call`` of a decoder while ``attach``ed, after ``check_call`` has looked at it.

    Gradient checkpointing runs blocks again in the backward pass, when the hooks may be gone: it is refused.
    """

    def __init__(self, sites: ModelSites, what: str, check_call: Callable[[Call], None] | None = None) -> None:
        self.what = what
        self._sites = sites
        self._check = check_call
        self._call: Call | None = None
        self._signature = inspect.signature(sites.decoder.forward)
        self.n_calls = 0

    @property
    def call(self) -> Call:
        if self._call is None:
            raise InputError(f"{self.what}: run the model or its decoder as a whole, not single blocks of it")
        return self._call

    def attach(self, hooks: Hooks) -> None:
        hooks.watch(self._sites.decoder, self._see)

    def warn_if_unused(self) -> None:
        """The most common way to get an intervention without an effect: the model ran elsewhere."""
        if self.n_calls == 0:
            warnings.warn(
                f"{self.what}: the model did not run inside the block, or ran compiled (a compiled model does not see "
                "hooks that came later)",
                stacklevel=4,
            )

    def _see(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for layer, block in enumerate(self._sites.blocks):
            if getattr(block.block, "gradient_checkpointing", False) and block.block.training:
                check(
                    not torch.is_grad_enabled(),
                    f"{self.what}: layer {layer} uses gradient checkpointing, which runs it again in the backward "
                    "pass, where hooks may be gone; call model.gradient_checkpointing_disable() first",
                    UnsupportedModelError,
                )
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**bound.pop("kwargs", {}), **bound}
        self._call = _read(given)
        self.n_calls += 1
        if self._check is not None:
            self._check(self._call)


def refuse_compiled(sites: ModelSites, what: str) -> None:
    """Raise UnsupportedModelError if the model was compiled: it would run without the hooks."""
    compiled = [
        name or "the model itself"
        for name, module in sites.model.named_modules()
        if module._compiled_call_impl is not None or "_compiled_call" in vars(module)
    ]
    check(
        not compiled,
        f"{what}: {', '.join(compiled[:4])} was compiled before, and compiled code does not see new hooks; expected a "
        "model that has not been compiled",
        UnsupportedModelError,
    )


def _read(given: dict[str, Any]) -> Call:
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    batch, length = tokens.shape[:2]
    cache = given.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    mask = given.get("attention_mask")
    real = None
    own_mask = mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)
    if mask is not None and not own_mask:
        check(
            mask.shape[0] == batch and mask.shape[1] >= past + length,
            f"attention_mask: expected [{batch}, {past + length}] (cached and new tokens), got {list(mask.shape)}",
        )
        real = mask[:, : past + length].bool()
    return Call(batch, length, past, real, given.get("position_ids"), own_mask, cache, tokens.device)
