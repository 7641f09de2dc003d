"""Whether the layers below a tuner's first one still give what was kept of them: weights, hooks, randomness."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from pyarith.errors import InputError, UnsupportedModelError, check
from pyarith.models.sites import ModelSites, length_limits

_SAMPLES = 512  # values looked at per tensor, spread so that every head's rows and columns have some
_SHOWN = 4
# transformers leaves hooks of its own in a model once attentions or hidden states were asked for; they only look
_HARMLESS = "transformers.utils.output_capturing"


class PrefixGuard:
    """Embeddings and blocks below ``first_layer`` as they were when this was made.

    ``check`` costs some ten microseconds a layer. It sees replaced tensors and modules, writes that torch counts
    (``_version``), hooks, forwards that were replaced, active dropout. ``check_values`` compares 512 values of each
    tensor too, for writes through ``.data``, which torch does not count; single values between them go unseen.
    """

    def __init__(self, sites: ModelSites, first_layer: int, trained: Iterable[nn.Parameter]) -> None:
        self.first_layer = first_layer
        names = {module: name for name, module in sites.model.named_modules()}
        self._blocks = [one.block for one in sites.blocks[:first_layer]]
        inside = list(dict.fromkeys(chain.from_iterable(block.modules() for block in self._blocks)))
        above = {module for one in sites.blocks[first_layer:] for module in one.block.modules()}
        above.update(inside, sites.final_norm.modules())
        # what the decoder has before its blocks; rotary tables, which some kinds rewrite in every pass, serve all
        around = [m for m in sites.decoder.modules() if m not in above and not hasattr(m, "rope_type")]
        self._names = {module: names[module] for module in (*inside, *around)}
        self._callers = {module: names[module] for module in (sites.model, sites.decoder, *inside)}
        self._hooks_inside = [d for m in inside for d in (m._forward_hooks, m._forward_pre_hooks)]
        own = [m for m in around if m is not sites.decoder]  # the decoder's hooks may come and go
        self._hooks_around = [d for m in own for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._hook_ids = list(chain.from_iterable(self._hooks_around))
        self._within = [vars(m) for m in inside if m not in set(self._blocks)]
        held = (d for m in (*inside, *around) for d in (m._modules, m._parameters, m._buffers))
        self._dicts: list[dict[str, Any]] = [d for d in held if d]
        self._dropouts = [(m, key) for m in (*inside, *around) for key in _dropout_names(m)]
        self._limit = min((tokens for what, tokens in length_limits(sites) if what.startswith("rope")), default=None)
        shared = {id(value) for value in trained} & {id(value) for value in self._tensors()}
        check(
            not shared,
            f"tuner: layers below layer {first_layer} share weights with trained ones above, so they change too",
            UnsupportedModelError,
        )
        self._held = self._tensors()  # so that no new tensor takes the identity of one of these
        self._facts = self._read()
        self._values = [_sample(value) for value in self._tensors()]

    def check(self) -> None:
        """Raise where what was kept would not be what the model computes now.

        Raises:
            InputError: weights, modules or hooks below changed.
            UnsupportedModelError: hooks or forwards of their own in the layers below; dropout that is active there.
        """
        if list(chain.from_iterable(self._hooks_around)) != self._hook_ids:
            raise InputError(self._changed("hooks of the embeddings"))
        found = [
            f"a hook {getattr(hook, '__qualname__', hook)}"
            for hooks in self._hooks_inside
            if hooks
            for hook in hooks.values()
            if getattr(hook, "__module__", None) != _HARMLESS
        ]
        if not found and any("forward" in attributes for attributes in self._within):
            found = ["a forward of its own in a module"]
        if found:
            raise UnsupportedModelError(
                f"model: layers below layer {self.first_layer} have {', '.join(found[:_SHOWN])}, which would not run "
                "where kept states are served; remove it, or train without a PrefixCache"
            )
        if self._read() != self._facts:
            raise InputError(self._changed("weights or modules, such as " + self._first_change()))
        self._refuse_dropout()

    def check_values(self) -> None:
        """Compare the sampled values of all tensors below, too.

        Raises:
            InputError: some differ; names the tensor.
        """
        for (name, value), kept in zip(self._named(), self._values, strict=True):
            if not torch.equal(_sample(value), kept):
                raise InputError(self._changed(f"weights, such as {name}"))

    def check_length(self, input_ids: Tensor, position_ids: Any) -> None:
        """Raise UnsupportedModelError for lengths at which states depend on what else went through the model."""
        if self._limit is None:
            return
        length = input_ids.shape[1] if position_ids is None else int(position_ids.max()) + 1
        check(
            length <= self._limit,
            f"input_ids: {length} tokens; beyond {self._limit} this model's rotary embedding depends on the length of "
            "everything that went through it, so states cannot be kept; use shorter rows, or train without a "
            "PrefixCache",
            UnsupportedModelError,
        )

    def check_attachable(self) -> None:
        """Raise UnsupportedModelError where what runs the layers below was compiled or replaced."""
        compiled = [
            name or "the model itself"
            for module, name in self._callers.items()
            if module._compiled_call_impl is not None
        ]
        check(
            not compiled,
            f"model: {', '.join(compiled[:_SHOWN])} was compiled, and compiled code does not see kept states; compile "
            f"blocks from layer {self.first_layer} on, or train without a PrefixCache",
            UnsupportedModelError,
        )
        taken = [self._names[block] for block in self._blocks if "forward" in vars(block)]
        check(
            not taken,
            f"model: {', '.join(taken[:_SHOWN])}: the forward was replaced; expected blocks that run their class's own "
            "(another PrefixCache, or offloading by accelerate)",
            UnsupportedModelError,
        )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything below."""
        return ((name, value.detach()) for name, value in self._named())

    def _refuse_dropout(self) -> None:
        active = [(m, key) for m, key in self._dropouts if m.training and getattr(m, key) > 0]
        if active:
            shown = ", ".join(
                f"{self._names[m] or 'the decoder'} ({key}={getattr(m, key)})" for m, key in active[:_SHOWN]
            )
            raise UnsupportedModelError(
                f"model: dropout is active below layer {self.first_layer}: {shown}. It draws anew in every pass, so "
                "kept states would not be what training computes; set it to 0, call model.eval(), or train without a "
                "PrefixCache"
            )

    def _changed(self, what: str) -> str:
        return (
            f"PrefixCache: expected everything below layer {self.first_layer} as it was when the cache was made; since "
            f"then {what} changed. Make a new PrefixCache (with another folder, if it has one)"
        )

    def _tensors(self) -> list[Tensor]:
        return [value for value in self._everything() if isinstance(value, Tensor)]

    def _everything(self) -> list[Any]:
        """What the modules below hold: modules, tensors, None for a bias that is left out."""
        return list(chain.from_iterable(values.values() for values in self._dicts))

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for module, name in self._names.items():
            for key, value in (*module._parameters.items(), *module._buffers.items()):
                if value is not None:
                    yield f"{name}.{key}", value

    def _read(self) -> tuple[list[int], list[int], list[int]]:
        """Identities of modules and tensors, versions and places of tensors."""
        everything = self._everything()
        tensors = [value for value in everything if isinstance(value, Tensor)]
        return list(map(id, everything)), [t._version for t in tensors], [t.data_ptr() for t in tensors]

    def _first_change(self) -> str:
        _, versions, places = self._read()
        old = list(zip(*self._facts[1:], strict=True))
        for (name, _), new, before in zip(self._named(), zip(versions, places, strict=True), old, strict=False):
            if new != before:
                return name
        return "a module"


def _dropout_names(module: nn.Module) -> list[str]:
    """Attributes of a module that hold a probability of dropping something."""
    if isinstance(module, _DropoutNd):
        return ["p"]
    return [key for key, value in vars(module).items() if "drop" in key and type(value) in (int, float)]


def _sample(value: Tensor) -> Tensor:
    """Bytes of values at an odd distance, so that they do not fall into the same few columns."""
    flat = value.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLES) | 1].clone().view(torch.uint8)
