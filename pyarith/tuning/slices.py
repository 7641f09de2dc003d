"""Which rows and columns of a model's weights belong to chosen heads and MLPs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pyarith.errors import UnsupportedModelError, check
from pyarith.models.quantised import kind_of
from pyarith.models.sites import ModelSites
from pyarith.models.weights import is_linear, takes_in_first
from pyarith.types import Head

KV = ("group", "none")

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Slice:
    """Part of one parameter: all of it but for one axis, along which only ``ranges`` are taken.

    Attributes:
        name: of the parameter, as in the model's state dict.
        layer: decoder block.
        module: the projection (nn.Linear or Conv1D) that owns it.
        attribute: "weight" or "bias".
        outputs: True where ``ranges`` counts the projection's output features (rows of W_Q), False for its input
            features (columns of W_O).
        ranges: sorted, disjoint (start, stop) pairs that do not touch.
    """

    name: str
    layer: int
    module: nn.Module
    attribute: str
    outputs: bool
    ranges: Ranges

    @property
    def weight(self) -> nn.Parameter:
        """The model's own parameter."""
        found: nn.Parameter = getattr(self.module, self.attribute)
        return found

    @property
    def dim(self) -> int:
        """Axis of the parameter that ``ranges`` counts: nn.Linear keeps [out, in], Conv1D [in, out]."""
        return int(self.weight.ndim == 2 and self.outputs == takes_in_first(self.module))

    @property
    def length(self) -> int:
        """Features taken."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the compact slice: the parameter's, with ``length`` along ``dim``."""
        shape = list(self.weight.shape)
        shape[self.dim] = self.length
        return tuple(shape)

    @property
    def whole(self) -> bool:
        """Whether the slice is the whole parameter."""
        return self.length == self.weight.shape[self.dim]

    def views(self) -> list[Tensor]:
        """The ranges as views of the parameter's own storage, one each."""
        return [self.weight.data.narrow(self.dim, start, stop - start) for start, stop in self.ranges]

    def parts(self, compact: Tensor) -> Sequence[Tensor]:
        """A compact slice cut into the ranges, as views."""
        sizes = [stop - start for start, stop in self.ranges]
        return compact.split(sizes, self.dim)


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Sorted, with touching ranges made one."""
    done: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if done and done[-1][1] >= start:
            done[-1] = (done[-1][0], max(stop, done[-1][1]))
        else:
            done.append((start, stop))
    return tuple(done)


def head_slices(sites: ModelSites, heads: Sequence[Head], kv: str) -> list[Slice]:
    """Rows of W_Q, W_K, W_V with their biases and columns of W_O of heads, layer by layer.

    Raises:
        InputError: ``kv`` is neither "group" nor "none".
        UnsupportedModelError: a projection is not a plain nn.Linear or Conv1D.
    """
    check(kv in KV, f"kv: expected one of {', '.join(KV)}, got {kv!r}")
    names = {module: name for name, module in sites.model.named_modules()}
    found = []
    for layer in sorted({head.layer for head in heads}):
        own = [head.head for head in heads if head.layer == layer]
        wanted: dict[str, list[tuple[int, int]]] = {}
        for part, one in [("q", h) for h in own] + [
            (part, g) for part in "kv" if kv == "group" for g in sorted({h // sites.group for h in own})
        ]:
            path, first = sites.qkv_rows(part, one)
            wanted.setdefault(path, []).append((first, first + sites.d_head))
        for path, rows in wanted.items():
            module = sites.blocks[layer].block.get_submodule(path)
            found += _of_module(sites, names, layer, module, True, joined(rows))
        columns = joined((h * sites.d_head, (h + 1) * sites.d_head) for h in own)
        found += _of_module(sites, names, layer, sites.blocks[layer].o_proj, False, columns)
    return found


def mlp_slices(sites: ModelSites, layers: Iterable[int]) -> list[Slice]:
    """Every parameter of the MLPs of layers.

    Raises:
        UnsupportedModelError: an MLP has parameters outside plain nn.Linear and Conv1D modules.
    """
    names = {module: name for name, module in sites.model.named_modules()}
    found: list[Slice] = []
    for layer in sorted(layers):
        mlp, before = sites.blocks[layer].mlp, len(found)
        for module in mlp.modules():
            if is_linear(module) or kind_of(module) is not None:  # quantised ones are refused by name
                weight: Any = module.weight
                width = int(weight.shape[int(takes_in_first(module))])
                found += _of_module(sites, names, layer, module, True, ((0, width),))
        covered = {id(one.weight) for one in found[before:]}
        left = [name for name, parameter in mlp.named_parameters() if id(parameter) not in covered]
        if left:
            raise UnsupportedModelError(
                f"mlps: layer {layer} of family {sites.spec.name!r} keeps parameters outside plain linear projections, "
                f"which cannot be trained as slices: {', '.join(left[:4])}"
            )
    return found


def _of_module(
    sites: ModelSites, names: dict[nn.Module, str], layer: int, module: Any, outputs: bool, ranges: Ranges
) -> list[Slice]:
    kind = kind_of(module)
    if kind is not None:
        raise UnsupportedModelError(
            f"heads, mlps: layer {layer} of family {sites.spec.name!r}: {names[module]} is quantised ({kind}) and its "
            "codes cannot take gradient steps. Find heads on the quantised model, then load it in fp32, bf16 or fp16: "
            "slices of that can be trained. On the quantised one LoRA adapters (peft) can"
        )
    if not is_linear(module):
        raise UnsupportedModelError(
            f"heads, mlps: layer {layer} of family {sites.spec.name!r}: expected {names[module]} to be a plain "
            f"nn.Linear or Conv1D with its own forward, found {type(module).__name__}; merge adapters "
            "(merge_and_unload()) first"
        )
    made = [Slice(f"{names[module]}.weight", layer, module, "weight", outputs, ranges)]
    if outputs and module.bias is not None:  # the bias of W_O belongs to no head
        made.append(Slice(f"{names[module]}.bias", layer, module, "bias", True, ranges))
    return made
