"""Models with PEFT adapters: the model inside the wrapper, and what an output projection with adapters computes.

Adapters live in the modules of the model that PEFT wraps, so that its own forward runs them. Only a head's write needs
numbers of its own: W_O as the adapters have it. peft is never imported; its layers are known by their base class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyarith.errors import UnsupportedModelError

# Kinds whose whole effect is in their layers, so that the inner model alone computes what the wrapped one does.
_IN_LAYERS = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "IA3", "LN_TUNING")
_MERGE = "merge them (model.merge_and_unload()) and pass the result"


def _of_peft(value: Any, class_name: str) -> bool:
    return any(kind.__name__ == class_name and kind.__module__.startswith("peft.") for kind in type(value).__mro__)


def is_adapted(module: Any) -> bool:
    """Whether ``module`` is a layer of PEFT around one of the model's own."""
    return _of_peft(module, "BaseTunerLayer")


def has_adapters(model: nn.Module) -> bool:
    """Whether modules of the model carry adapters or are PEFT's copies of its own."""
    return any(is_adapted(module) or _of_peft(module, "AuxiliaryTrainingWrapper") for module in model.modules())


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside a ``PeftModel``, whose modules hold the adapters; any other model itself.

    Raises:
        UnsupportedModelError: a kind of adapter that does more than its layers (prompt and prefix tuning, X-LoRA,
            activated LoRA), or that pyarith does not know.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return model
    for name, config in configs.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        activated = getattr(config, "alora_invocation_tokens", None) is not None
        if kind not in _IN_LAYERS or activated:
            found = "activated LoRA" if activated else kind
            raise UnsupportedModelError(
                f"model: PEFT adapter {name!r} of kind {found} is not supported: expected one of "
                f"{', '.join(_IN_LAYERS)}, whose whole effect is in the layers that they wrap; {_MERGE} where the kind "
                "can be merged"
            )
    return model.base_model.model if _of_peft(model, "PeftModel") or _of_peft(model, "PeftMixedModel") else model


def refuse_adapters(model: Any, what: str) -> None:
    """Refuse a model with adapters where weights are to be changed.

    Raises:
        UnsupportedModelError: it has some.
    """
    if isinstance(model, nn.Module) and has_adapters(model):
        raise UnsupportedModelError(
            f"model: {what} changes weights of the model itself, which has PEFT adapters on top of them; {_MERGE}, or "
            "take them off (model.unload())"
        )


def adapter_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that belong to adapters; PEFT keeps them in fp32 beside 16-bit weights."""
    found: set[int] = set()
    module: Any
    for module in model.modules():
        if is_adapted(module):
            held = [getattr(module, name) for name in module.adapter_layer_names if hasattr(module, name)]
            for part in held:
                found.update(id(p) for p in ([part] if isinstance(part, Tensor) else part.parameters()))
    return found


def adapter_state(model: Any) -> tuple[Any, ...]:
    """Changes when adapters are switched, scaled or merged, which no weight and no hook shows."""
    return tuple(
        (
            tuple(module.active_adapters),
            module.disable_adapters,
            tuple(getattr(module, "merged_adapters", ())),
            tuple(getattr(module, "scaling", {}).items()),
        )
        for module in model.modules()
        if is_adapted(module) or _of_peft(module, "AuxiliaryTrainingWrapper")
    )


def inner(module: Any) -> nn.Module:
    """The module that runs behind PEFT's copies of whole modules (``modules_to_save``); any other module itself."""
    while _of_peft(module, "ModulesToSaveWrapper"):
        off = module.disable_adapters or not module.active_adapters
        module = module.original_module if off else module.modules_to_save[module.active_adapters[0]]
    found: nn.Module = module
    return found


def base_layer(module: Any) -> nn.Module:
    """The model's own module below the adapters."""
    module = inner(module)
    while is_adapted(module):
        module = module.base_layer
    found: nn.Module = module
    return found


@torch.no_grad()
def adapter_delta(module: Any, where: str, dtype: torch.dtype) -> Tensor | None:
    """What the active adapters of a layer add to the weight below them, in ``dtype`` and in that weight's layout.

    delta = sum over active adapters of scaling * B @ A for LoRA, in general what PEFT's own ``get_delta_weight`` says.

    Returns:
        None where nothing is added: no adapter is active, or all are merged.
    Raises:
        UnsupportedModelError: adapters that are no addition to the weight (DoRA and other variants of LoRA, IA3), or
            that are merged and switched off, which the next forward pass would undo.
    """
    total: Tensor | None = None
    while is_adapted(module):  # PEFT's mixed models wrap adapters of one kind in those of another
        for delta in _deltas(module, where):
            total = delta.to(dtype) if total is None else total + delta.to(dtype)
        module = module.base_layer
    return total


def _deltas(module: Any, where: str) -> Iterator[Tensor]:
    merged = list(module.merged_adapters)
    if merged and module.disable_adapters:
        raise UnsupportedModelError(
            f"model: {where} has merged adapters {merged} that are switched off: its next forward pass changes its "
            "weights; call model.unmerge_adapter() first"
        )
    if merged or module.disable_adapters:
        return  # with merged adapters PEFT runs the layer below alone
    for name in module.active_adapters:
        if name not in _held(module):
            continue
        variant = getattr(module, "lora_variant", {}).get(name)
        if variant is not None or not hasattr(module, "get_delta_weight"):
            kind = type(module if variant is None else variant).__name__
            raise UnsupportedModelError(
                f"model: {where} has adapter {name!r} of kind {kind}, which is no sum of weights (as DoRA is none), so "
                f"what a single head writes cannot be read from it; {_MERGE}"
            )
        yield module.get_delta_weight(name)


def _held(module: Any) -> set[str]:
    """Names of the adapters that this layer has."""
    return {name for part in module.adapter_layer_names for name in getattr(module, part, {})}
