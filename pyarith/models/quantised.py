"""Quantised linear layers of bitsandbytes and torchao: found, read in high precision, run without being changed.

bitsandbytes has classes of its own (``Linear8bitLt``, ``Linear4bit``) with packed weights; torchao keeps nn.Linear and
gives it a weight that is a tensor subclass. Both are told by the names of their classes: importing them costs seconds.
"""

from __future__ import annotations

import copy
import inspect
import logging
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyarith.errors import UnsupportedModelError, check

_METHODS = ("bitsandbytes", "torchao")
_runs_here: weakref.WeakKeyDictionary[nn.Module, tuple[torch.device, frozenset[str]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Quantised:
    """What is quantised in a model.

    Attributes:
        kinds: (name of the kind, how many linears), sorted.
        compute: dtypes, beside the model's own, that the products run in.
        activations: whether some kind quantises what goes into its linears too, row by row.
        blocks: whether what a row gets also depends on the other rows of its block: LLM.int8 keeps a column in 16 bit
            as soon as one row of the block has an outlier there.
    """

    kinds: tuple[tuple[str, int], ...]
    compute: frozenset[torch.dtype]
    activations: bool
    blocks: bool

    def __str__(self) -> str:
        text = ", ".join(f"{name} ({count} linears)" for name, count in self.kinds)
        if self.activations:
            text += "; activations in int8"
        if self.blocks:
            text += ", outlier columns by block: results depend on the block, which the noise floor includes"
        return text


def kind_of(module: nn.Module) -> str | None:
    """Name of the kind of a quantised linear layer; None for anything else."""
    names = {base.__name__ for base in type(module).__mro__ if base.__module__.startswith("bitsandbytes.")}
    if "Linear8bitLt" in names:
        return "bitsandbytes LLM.int8"
    if "Linear4bit" in names:
        return f"bitsandbytes {module.weight.quant_type}"  # type: ignore[union-attr]
    weight = module._parameters.get("weight")
    if weight is not None and type(weight).__module__.startswith("torchao."):
        bits = str(getattr(weight, "target_dtype", "")).removeprefix("torch.")
        act = " with quantised activations" if _quantises_activations(module) else ""
        return f"torchao {type(weight).__name__}{f' {bits}' if bits else ''}{act}"
    return None


def _quantises_activations(module: Any) -> bool:
    weight = module.weight
    names = ("act_quant_kwargs", "activation_quantization")
    return hasattr(module, "state") or any(getattr(weight, name, None) is not None for name in names)


def _linears(model: nn.Module) -> list[tuple[str, Any, str]]:
    """(name, module, kind) of all quantised linears."""
    found = [(name, module, kind_of(module)) for name, module in model.named_modules()]
    return [(name, module, kind) for name, module, kind in found if kind is not None]


def refuse_method(model: Any) -> None:
    """Refuse a model that was quantised by another library.

    Raises:
        UnsupportedModelError: the method is none of those that can be read.
    """
    config = getattr(model.config, "quantization_config", None)
    quantizer = getattr(model, "hf_quantizer", None)
    if config is None:
        config = getattr(quantizer, "quantization_config", None)
    if config is None and quantizer is None:
        return
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    name = str(getattr(method, "value", method))
    check(
        name in _METHODS,
        f"model: quantised weights are supported from {' and '.join(_METHODS)}, got method {name!r}; load the model in "
        "fp32, bf16 or fp16, or quantise it with one of these",
        UnsupportedModelError,
    )


def own_parameters(model: nn.Module) -> set[int]:
    """ids of the parameters of quantised linears: their dtypes are the library's own."""
    return {id(p) for _, module, _ in _linears(model) for p in module.parameters(recurse=False)}


def describe(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Quantised | None:
    """What is quantised in ``model``, each kind tried on one row; None where nothing is.

    Raises:
        UnsupportedModelError: a kind cannot run here, with the library's own reason, or cannot be read back.
    """
    linears = _linears(model)
    if not linears:
        return None
    away = [name for name, module, _ in linears if module.weight.is_meta]
    check(
        not away,
        f"model: {', '.join(away[:3])}: quantised weights are offloaded, where they cannot be read; load the model "
        "unquantised, or with a device_map that keeps all of them on devices",
        UnsupportedModelError,
    )
    compute: set[torch.dtype] = set()
    first: dict[str, tuple[str, Any]] = {}
    for name, module, kind in linears:
        compute.add(_compute_dtype(module, dtype))
        first.setdefault(kind, (name, module))
    tried = (device, frozenset(first))
    if _runs_here.get(model) != tried:
        with held(model):
            for kind, (name, module) in first.items():
                _try(kind, name, module, dtype)
        _runs_here[model] = tried
    int8 = [module for _, module, kind in linears if kind == "bitsandbytes LLM.int8"]
    return Quantised(
        kinds=tuple(sorted(Counter(kind for _, _, kind in linears).items())),
        compute=frozenset(compute - {dtype}),
        activations=any(_quantises_activations(module) for _, module, _ in linears),
        blocks=any(module.state.threshold > 0 for module in int8),
    )


def _compute_dtype(module: Any, dtype: torch.dtype) -> torch.dtype:
    if hasattr(module, "state"):
        return torch.float16  # LLM.int8 casts what it quantises to fp16
    if hasattr(module, "compute_dtype"):
        return torch.bfloat16 if _is_packed(module.weight) else module.compute_dtype or dtype
    return dtype


def _try(kind: str, name: str, module: Any, dtype: torch.dtype) -> None:
    """One row through one linear, and its weight read back: whether this works here, the library knows best."""
    device = module.weight.device
    if getattr(module.weight, "has_fp16_weights", False):
        raise UnsupportedModelError(
            f"model: {name} is quantised anew in every forward pass (llm_int8_has_fp16_weight=True); load it with False"
        )
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            module(torch.ones(1, 1, module.in_features, dtype=dtype, device=device))
            shape = tuple(dense_weight(module, torch.float32).shape)
    except Exception as error:  # each library and kernel fails in its own way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedModelError(
            f"model: {name} is quantised as {kind}, which cannot run on {device} here: {type(error).__name__}: "
            f"{reason[:300]}. Load the model in fp32, bf16 or fp16, in another format, or on another device"
        ) from error
    check(
        shape == (module.out_features, module.in_features),
        f"model: {name} ({kind}): expected a weight of [{module.out_features}, {module.in_features}] when read back, "
        f"got {list(shape)}",
        UnsupportedModelError,
    )


def in_features(module: Any) -> int:
    """Input features of a linear layer, packed or not; nn.Linear keeps [out, in], Conv1D [in, out]."""
    return int(module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0])


def dense_weight(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a quantised linear layer as [out, in] in ``dtype``; a new tensor.

    LLM.int8: codes * absmax / 127 per row; 4 bit: table[code] * absmax per block, absmax in fp32; torchao: what its
    own ``dequantize`` gives, in fp32 where it offers that, else in the dtype of the weight.
    """
    weight = module.weight
    if hasattr(module, "state"):
        scale = module.state.SCB if module.state.SCB is not None else weight.SCB
        return weight.data.to(dtype) * (scale.to(dtype) / 127)[:, None]
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        data, state = _unpacked(weight)
        state = copy.copy(state)
        state.dtype = torch.float32
        return dequantize_4bit(data, state).to(dtype)
    chooses = "output_dtype" in inspect.signature(weight.dequantize).parameters
    return (weight.dequantize(torch.float32) if chooses else weight.dequantize()).to(dtype)


def n_parameters(module: nn.Module) -> int:
    """Parameters of a module; packed weights count what they stand for."""
    packed = {id(m.weight): m.in_features * m.out_features for _, m, _ in _linears(module)}
    return sum(packed.get(id(p), p.numel()) for p in module.parameters())


def held_width(module: nn.Module) -> int:
    """Columns per row that a module made of quantised linears holds at once: their results, and as much again for what
    is made of them (an activation, a gate's product, sums in int32); 0 where it has none."""
    return 2 * sum(m.out_features for _, m, _ in _linears(module))


def scratch_bytes(model: nn.Module) -> int:
    """Bytes of the largest quantised weight made dense in fp32, as its product makes it for a moment."""
    return max((4 * m.in_features * m.out_features for _, m, _ in _linears(model)), default=0)


# tensors as they are stored


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """``tensor``, or the plain tensors that a wrapper subclass (torchao's) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, part)
        if isinstance(inner, Tensor):
            yield from plain_tensors(f"{name}.{part}", inner)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in plain tensors, the same before and after a forward pass.

    On CPUs with bf16 instructions bitsandbytes packs a 4-bit weight anew in its first forward pass, with its scales
    rounded to bf16, and ``state_dict`` of such a model scrambles them (0.50.2). These weights are read here without
    it, and always in the first order and with the rounded scales.
    """
    four_bit = {name: m for name, m, _ in _linears(model) if hasattr(m.weight, "quant_state")}
    with ExitStack() as stack:
        for module in four_bit.values():
            vars(module)["_save_to_state_dict"] = lambda *_: None
            stack.callback(vars(module).pop, "_save_to_state_dict")
        found = dict(part for name, value in model.state_dict().items() for part in plain_tensors(name, value))
    for name, module in four_bit.items():
        data, state = _unpacked(module.weight)
        found |= {f"{name}.weight": data, f"{name}.weight.absmax": _absmax(state).bfloat16()}
        if module.bias is not None:
            found[f"{name}.bias"] = module.bias
    return found


def _is_packed(weight: Any) -> bool:
    return getattr(weight.quant_state, "packing_format_for_cpu", False)


def _unpacked(weight: Any) -> tuple[Tensor, Any]:
    """Codes and state of a 4-bit weight in the order in which it was quantised; copies where it has been packed."""
    if not _is_packed(weight):
        return weight.data, weight.quant_state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(weight.quant_state)
    state.original_nested = False  # scales quantised once more would differ
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.t().reshape(-1).float()
    return data, state


def _absmax(state: Any) -> Tensor:
    """Scales of a 4-bit weight, one a block, fp32."""
    if not state.nested:
        return state.absmax.float()
    from bitsandbytes.functional import dequantize_blockwise

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


# running


class _SaidOnce(logging.Filter):
    """LLM.int8 warns about its cast to fp16 at every product; results say it once, in their settings."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "inputs will be cast from" not in record.getMessage()


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Keep quantised linears from changing themselves in a forward pass, and from filling the log.

    ``Linear4bit`` would pack its weight anew on some CPUs, both classes of bitsandbytes cast their bias in place.
    """
    linears = [module for _, module, _ in _linears(model)]
    log, said = logging.getLogger("bitsandbytes.autograd._functions"), _SaidOnce()
    packs = [(m, m.support_avx512bf16_for_cpu) for m in linears if hasattr(m, "support_avx512bf16_for_cpu")]
    biases = [(m.bias, m.bias.data) for m in linears if m.bias is not None]
    try:
        log.addFilter(said)
        for module, _ in packs:
            module.support_avx512bf16_for_cpu = False
        yield
    finally:
        log.removeFilter(said)
        for module, before in packs:
            module.support_avx512bf16_for_cpu = before
        for bias, data in biases:
            if bias.data.dtype != data.dtype:
                bias.data = data
