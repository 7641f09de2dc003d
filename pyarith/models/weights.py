"""Weights in the shapes that the ops want: views of the model's own storage, never copies.

``read_norm`` and ``read_mlp`` return None where a module is not the known pattern (another class, an
adapter, hooks, a parametrisation, an overridden forward): the engine then calls the module itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyarith.errors import UnsupportedModelError
from pyarith.models.adapters import adapter_delta, base_layer, is_adapted
from pyarith.models.placement import is_offloaded, own_forward, weight_of
from pyarith.models.quantised import dense_weight, kind_of
from pyarith.models.sites import ModelSites
from pyarith.models.streaming import ChunkedLinear

# what the activation modules of transformers compute
_ACTS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
}


@dataclass(frozen=True)
class NormWeights:
    """Norm parameters for ``ops.add_norm``: kind, weight [d_model], bias [d_model] or None, eps."""

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Projection:
    """A linear map as ``x @ matrix + bias`` with matrix [d_in, d_out] (a view)."""

    matrix: Tensor
    bias: Tensor | None

    def apply(self, x: Tensor, out: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self.matrix, out=out)
        return torch.addmm(self.bias, x, self.matrix, out=out)


@dataclass(frozen=True)
class MlpWeights:
    """``down(act(gate) * up)``; ``gate`` holds gate and up side by side when ``fused``; ``up`` None for a plain MLP."""

    gate: Projection
    up: Projection | None
    down: Projection
    act: str
    fused: bool

    @property
    def d_mlp(self) -> int:
        return self.down.matrix.shape[0]

    @property
    def width(self) -> int:
        """Columns of intermediate results kept per row."""
        return self.gate.matrix.shape[1] + (self.up.matrix.shape[1] if self.up is not None else 0)


def is_plain(module: nn.Module) -> bool:
    """True when calling ``module`` runs its class's own forward and nothing else, on weights that are there."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return not any(hooks) and own_forward(module) and not hasattr(module, "parametrizations")


def _from_library(module: nn.Module, class_name: str) -> bool:
    kind = type(module)
    return kind.__name__ == class_name and kind.__module__.startswith(("transformers.", "torch.nn."))


def read_norm(sites: ModelSites, norm: Any) -> NormWeights | None:
    if not (is_plain(norm) and _from_library(norm, sites.spec.norm_class)) or is_offloaded(norm):
        return None
    eps = getattr(norm, "variance_epsilon", None)
    return NormWeights(sites.spec.norm, norm.weight, getattr(norm, "bias", None), norm.eps if eps is None else eps)


def takes_in_first(module: nn.Module) -> bool:
    """Whether a projection keeps its weight as [in, out], as Conv1D does; nn.Linear keeps [out, in]."""
    return _from_library(module, "Conv1D")  # by name: importing transformers' class would cost start-up time


def adds_bias_apart(module: nn.Module) -> bool:
    """Whether a projection rounds its product before it adds the bias, as FalconLinear does."""
    return _from_library(module, "FalconLinear")


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear, Conv1D and FalconLinear themselves, with their class's own forward; hooks around it do not
    matter."""
    known = type(module) in (nn.Linear, ChunkedLinear) or takes_in_first(module) or adds_bias_apart(module)
    own = own_forward(module) and not hasattr(module, "parametrizations")
    return known and own and kind_of(module) is None  # torchao quantises the weight and leaves the class


def read_projection(module: Any) -> Projection | None:
    if not (is_plain(module) and is_linear(module)) or is_offloaded(module):
        return None
    return Projection(module.weight if takes_in_first(module) else module.weight.t(), module.bias)


def fetch_projection(module: Any) -> Projection | None:
    """``read_projection``, with weights brought to the device where the module runs if they are offloaded."""
    if not (is_plain(module) and is_linear(module) and is_offloaded(module)):
        return read_projection(module)
    weight = weight_of(module, "weight")
    bias = None if module.bias is None else weight_of(module, "bias")
    return Projection(weight if takes_in_first(module) else weight.t(), bias)


def read_mlp(sites: ModelSites, mlp: nn.Module) -> MlpWeights | None:
    layout = sites.spec.mlp_spec
    if layout is None or not (is_plain(mlp) and _from_library(mlp, layout.class_name)):
        return None
    act_module = mlp.get_submodule(layout.act)
    act = _ACTS.get(type(act_module).__name__) if is_plain(act_module) else None
    first = read_projection(mlp.get_submodule(layout.first))
    up = read_projection(mlp.get_submodule(layout.up)) if layout.gate and layout.up else None
    down = read_projection(mlp.get_submodule(layout.down))
    if act is None or first is None or down is None or (layout.gate and up is None):
        return None
    return MlpWeights(first, up, down, act, fused=layout.gate_up is not None)


class HeadOutputs(Sequence[Tensor]):
    """``head_outputs`` of each layer; what is quantised or offloaded is there for one layer at a time."""

    def __init__(self, sites: ModelSites) -> None:
        self._sites = sites
        self._kept = [self._keep(block.o_proj) for block in sites.blocks]

    def _keep(self, o_proj: nn.Module) -> Tensor | None:
        made = head_outputs(self._sites, o_proj)  # refused here, before anything runs
        return None if kind_of(base_layer(o_proj)) is not None or is_offloaded(base_layer(o_proj)) else made

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, layer: Any) -> Any:
        kept, o_proj = self._kept[layer], self._sites.blocks[layer].o_proj
        if kept is None and kind_of(base_layer(o_proj)) is not None:  # a sweep has hooks of its own on it meanwhile
            return _quantised_outputs(self._sites, o_proj)
        return head_outputs(self._sites, o_proj) if kept is None else kept


def head_outputs(sites: ModelSites, o_proj: nn.Module) -> Tensor:
    """W_O per head as a view ``[head, d_head, d_model]``: ``head_write = z[h] @ out[h]``.

    A new tensor in row dtype where it is quantised, or where adapters add to it: W_O + sum of scaling * B @ A.

    Raises:
        UnsupportedModelError: the projection is not a plain nn.Linear or Conv1D, or its adapters cannot be read.
    """
    below = base_layer(o_proj)
    if is_plain(o_proj) and is_plain(below) and kind_of(below) is not None:
        return _quantised_outputs(sites, o_proj)
    projection = fetch_projection(below) if is_plain(o_proj) else None
    if projection is None:
        raise UnsupportedModelError(
            f"model: family {sites.spec.name!r}: expected {sites.spec.o_proj} to be a plain nn.Linear or Conv1D "
            f"without hooks or parametrisations, found {type(below).__name__}; remove the hooks, merge "
            "the adapter or detach the SelectiveTuner first"
        )
    return _per_head(sites, o_proj, projection.matrix)


def _quantised_outputs(sites: ModelSites, o_proj: nn.Module) -> Tensor:
    return _per_head(sites, o_proj, dense_weight(base_layer(o_proj), sites.row_dtype).t())


def _per_head(sites: ModelSites, o_proj: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix [n_heads * d_head, d_model], with what adapters add to it, by heads."""
    delta = adapter_delta(o_proj, sites.spec.o_proj, sites.row_dtype) if is_adapted(o_proj) else None
    if delta is not None:
        matrix = matrix.to(delta.dtype) + (delta if takes_in_first(base_layer(o_proj)) else delta.t())
    return matrix.unflatten(0, (sites.n_heads, sites.d_head))
